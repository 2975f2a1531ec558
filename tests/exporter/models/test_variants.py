"""Checkpoints as save_pretrained writes them: variants, shards of variants, a pipeline or its transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from exporter.errors import InputError
from exporter.models.loading import load_transformer
from exporter.models.pixart import PixArtAdapter
from exporter.models.weight_files import weight_files

ADAPTER = PixArtAdapter()


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_variant_loads_beside_the_plain_weights(
    make_model: Callable[[str], PixArtTransformer2DModel], tmp_path: Path, shard: str
) -> None:
    plain, half = make_model("small"), make_model("small").half()
    with torch.no_grad():
        half.proj_out.bias.fill_(0.5)
    plain.save_pretrained(tmp_path, max_shard_size=shard)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size=shard)
    assert (len(weight_files(tmp_path, "fp16")) > 1) == (shard == "20KB")
    assert set(weight_files(tmp_path, "fp16")).isdisjoint(weight_files(tmp_path))
    for variant, expected in ((None, plain), ("fp16", half)):
        found = load_transformer(tmp_path, ADAPTER, variant).state_dict()
        assert all(torch.equal(found[name], tensor.float()) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_variant_that_was_not_asked_for_is_named(
    make_model: Callable[[str], PixArtTransformer2DModel], tmp_path: Path, shard: str
) -> None:
    make_model("small").half().save_pretrained(tmp_path, variant="fp16", max_shard_size=shard)
    with pytest.raises(InputError, match=r"variants here: fp16; set model\.variant, as in --set model\.variant=fp16"):
        weight_files(tmp_path)
    with pytest.raises(InputError, match=r"no diffusion_pytorch_model\.bf16\.safetensors; variants here: fp16"):
        weight_files(tmp_path, "bf16")


def test_a_variant_that_is_not_there_is_refused(
    make_model: Callable[[str], PixArtTransformer2DModel], tmp_path: Path
) -> None:
    make_model("small").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"variants here: none; leave model\.variant out"):
        weight_files(tmp_path, "fp16")


def test_a_pickled_checkpoint_is_refused_with_the_fix(
    make_model: Callable[[str], PixArtTransformer2DModel], tmp_path: Path
) -> None:
    make_model("small").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match=r"a pickle can run any code.*safe_serialization=True"):
        load_transformer(tmp_path, ADAPTER)
