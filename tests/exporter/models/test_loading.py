"""Checkpoints load as diffusers loads them; whatever is wrong with one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporter.errors import InputError
from exporter.models.loading import load_transformer, model_shapes, skeleton
from exporter.models.location import read_config
from exporter.models.pixart import PixArtAdapter

ModelMaker = Callable[[str], nn.Module]

ADAPTER = PixArtAdapter()

WEIGHTS = "diffusion_pytorch_model.safetensors"
NAME = "transformer_blocks.1.attn2.to_k.weight"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite a checkpoint's tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def configure(folder: Path, **changes: Any) -> None:
    """Rewrite values of a checkpoint's config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("name", ["small", "micro", "micro_by_size", "unprojected"])
def test_the_model_computes_what_diffusers_computes(
    make_model: ModelMaker, checkpoint: Callable[..., Path], name: str
) -> None:
    model = load_transformer(checkpoint(name), ADAPTER)
    reference = make_model(name)
    inputs = ADAPTER.example_inputs(model, batch=2, tokens=3)
    with torch.no_grad():
        expected = reference(
            inputs.hidden_states,
            encoder_hidden_states=inputs.conditions["encoder_hidden_states"],
            timestep=inputs.timestep,
            encoder_attention_mask=inputs.conditions["encoder_attention_mask"],
            added_cond_kwargs={name: inputs.conditions.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
    assert torch.equal(ADAPTER.forward(model, inputs), expected)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(make_model: ModelMaker, checkpoint: Callable[..., Path], dtype: torch.dtype) -> None:
    model = load_transformer(checkpoint("small", dtype=dtype), ADAPTER)
    expected = make_model("small").to(dtype).float().state_dict()
    state = model.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_shards_load_as_one(make_model: ModelMaker, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("small", shard="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    state = load_transformer(folder, ADAPTER).state_dict()
    assert all(torch.equal(state[name], value) for name, value in make_model("small").state_dict().items())


def test_a_missing_shard_is_named(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("small", shard="40KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(InputError, match=f"names {last.name}, which is not there"):
        load_transformer(folder, ADAPTER)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_a_broken_index_is_named(checkpoint: Callable[..., Path], content: str) -> None:
    folder = checkpoint("small")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json: "):
        load_transformer(folder, ADAPTER)


def test_shapes_of_a_config_alone_are_those_of_the_model(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("micro")
    model = load_transformer(folder, ADAPTER)
    (folder / WEIGHTS).unlink()
    shapes = model_shapes(skeleton(read_config(folder), ADAPTER, folder / "config.json"), ADAPTER)
    assert shapes == model_shapes(model, ADAPTER)
    total = sum(shape.parameters for shape in shapes.linears.values()) + sum(shapes.others.values())
    assert total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(checkpoint: Callable[..., Path], keep: int) -> None:
    folder = checkpoint("small")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(InputError, match=rf"{WEIGHTS}: (damaged or incomplete safetensors|is empty)"):
        load_transformer(folder, ADAPTER)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "weights.pt"])
def test_pickles_are_refused_by_name(checkpoint: Callable[..., Path], name: str) -> None:
    folder = checkpoint("small")
    (folder / WEIGHTS).rename(folder / name)
    with pytest.raises(InputError, match=rf"{name} is refused: a pickle can run any code"):
        load_transformer(folder, ADAPTER)


@pytest.mark.parametrize("content", [b"PK\x03\x04\x14\x00\x08\x08" + b"x" * 50, b"\x80\x02}q\x00X\x01\x00" + b"x" * 50])
def test_pickles_are_refused_by_content(checkpoint: Callable[..., Path], content: bytes) -> None:
    folder = checkpoint("small")
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match="is a pickle"):
        load_transformer(folder, ADAPTER)


def test_a_git_lfs_pointer_is_recognised(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("small")
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="git lfs pull"):
        load_transformer(folder, ADAPTER)


def test_no_weights_and_ambiguous_weights(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("small")
    (folder / WEIGHTS).rename(folder / "only.safetensors")
    load_transformer(folder, ADAPTER)
    (folder / "second.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"which of only\.safetensors, second\.safetensors"):
        load_transformer(folder, ADAPTER)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="only the config is here"):
        load_transformer(folder, ADAPTER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"the weights lack {NAME} that config.json asks for"),
        (lambda t: [t.pop(n) for n in list(t) if "ff" in n], "and 5 more that config.json asks for"),
        (lambda t: t.update({NAME + "s": t.pop(NAME)}), f"weights is not part of the model .* did you mean '{NAME}'"),
        (
            lambda t: t.update({NAME: t[NAME][:, :-1].clone()}),
            r"has shape \[32, 31\], but config\.json asks for \[32, 32\]",
        ),
        (lambda t: t[NAME].view(-1)[:3].fill_(float("nan")), f"{NAME} is damaged: 3 NaN and 0 Inf among 1024 values"),
        (lambda t: t[NAME].view(-1)[:2].fill_(float("-inf")), f"{NAME} is damaged: 0 NaN and 2 Inf"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), f"{NAME} holds int8; expected floating-point"),
        (lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)}), "holds float8_e4m3fn"),
    ],
)
def test_damaged_tensors_are_named(
    checkpoint: Callable[..., Path], change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    folder = checkpoint("small")
    edit(folder, change)
    with pytest.raises(InputError, match=message):
        load_transformer(folder, ADAPTER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name is 'FluxTransformer2DModel', but family pixart is"),
        ({"_class_name": None}, "there is no _class_name"),
        ({"num_layers": "two"}, "num_layers: expected a whole number, got 'two'"),
        ({"num_layers": 0}, "num_layers: must be at least 1"),
        ({"num_layers": 10**9}, "num_layers: must be at most 1000"),
        ({"num_attention_heads": 10**5, "attention_head_dim": 10**5}, "over 131072"),
        ({"attention_head_dim": 15}, "need a multiple of 4"),
        ({"use_additional_conditions": True}, "needs a multiple of 3"),
        ({"patch_size": 3}, "sample_size 8 is not a multiple of patch_size 3"),
        ({"cross_attention_dim": 16}, "cross_attention_dim is 16, but the caption projection gives 32"),
        ({"cross_attention_dim": None}, "cross_attention_dim: expected a whole number, got nothing"),
        ({"out_channels": 3}, "out_channels is 3"),
        ({"activation_fn": "relu"}, "unknown activation_fn 'relu'"),
        ({"norm_type": "ada_norm"}, "unknown norm_type 'ada_norm'; did you mean 'ada_norm_single'"),
        ({"num_embeds_ada_norm": None}, "diffusers refuses it"),
    ],
)
def test_a_config_that_cannot_be_is_named(
    checkpoint: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    folder = checkpoint("small")
    configure(folder, **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_transformer(folder, ADAPTER)
    assert str(folder / "config.json") in str(caught.value)


def test_a_config_for_another_size_names_the_first_tensor(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("small")
    configure(folder, num_layers=1)
    with pytest.raises(InputError, match=r"transformer_blocks\.1\.\S+ is not part of the model"):
        load_transformer(folder, ADAPTER)
