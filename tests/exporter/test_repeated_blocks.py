"""A graph whose blocks were traced once per kind is the graph whose blocks were all traced."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import DiTTransformer2DModel, HunyuanDiT2DModel, PixArtTransformer2DModel
from torch import nn

from exporter.models.adapter import Adapter
from exporter.models.dit import DiTAdapter
from exporter.models.hunyuan import HunyuanAdapter
from exporter.models.pixart import PixArtAdapter
from exporter.passes import WAIST_PASSES, run_passes
from exporter.passes.history import PassResult
from exporter.plan import LayerPlan, Plan
from exporter.quantize import quantize_model, round_to_nearest
from exporter.runtime import OnnxSession
from exporter.targets import get_target
from exporter.to_onnx import to_onnx
from plugins.formats import get_format
from plugins.op import DOMAIN
from tests.exporter.models.small_families import T5_TOKENS, dit, hunyuan, pixart, strengthen

FAMILIES: dict[str, tuple[Adapter, int]] = {
    "pixart": (PixArtAdapter(), 1),
    # With a skip and without.
    "hunyuan": (HunyuanAdapter(), 2),
    "dit": (DiTAdapter(), 1),
}


def model_of(family: str) -> nn.Module:
    if family == "hunyuan":
        return hunyuan(sizes=False, blocks=6)
    model = pixart() if family == "pixart" else dit()
    strengthen(model)
    if family == "dit":
        first, second = (block.norm1.emb for block in model.transformer_blocks)
        second.load_state_dict(first.state_dict())
        DiTAdapter().share_weights(model)
    return model


def quantized(model: nn.Module, adapter: Adapter, odd: str = "") -> nn.Module:
    """Every linear of the blocks' attentions; that called `odd` in another format than the rest."""
    layers, weights = [], {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(adapter.blocks_path) and ".attn" in name:
            n, k = module.weight.shape
            fmt = "e1m2" if name == odd else "e2m1"
            layers.append(LayerPlan(name, n, k, module.bias is not None, fmt, "e2m3", 16, "group", "fp32"))
            scales = module.weight.detach().reshape(n, -1, 16).abs().amax(2) / 6
            weights[name] = round_to_nearest(module.weight.detach(), scales, get_format(fmt))
    return quantize_model(model, Plan(tuple(layers), (), 0, 0), weights)


def exported(
    model: nn.Module, adapter: Adapter, folder: Path, *, repeat: bool
) -> tuple[onnx.ModelProto, list[PassResult]]:
    """The waist graph, and what its passes changed."""
    path = folder / "traced.onnx"
    to_onnx(model, adapter, adapter.example_inputs(model, 2, T5_TOKENS), path, repeat=repeat)
    return run_passes(onnx.load(path), WAIST_PASSES, get_target("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_repeated_trace_is_the_whole_trace(family: str, tmp_path: Path) -> None:
    adapter, _ = FAMILIES[family]
    model = quantized(model_of(family), adapter)
    (whole, whole_passes), (repeated, passes) = (exported(model, adapter, tmp_path, repeat=r) for r in (False, True))
    print(whole_passes, passes)
    assert kinds_of_nodes(repeated) == kinds_of_nodes(whole)
    for batch in (1, 3):
        inputs = adapter.example_inputs(model, batch, T5_TOKENS).as_numpy()
        expected, found = (OnnxSession(graph).run(inputs)["sample"] for graph in (whole, repeated))
        np.testing.assert_array_equal(found, expected)


def kinds_of_nodes(graph: onnx.ModelProto) -> Counter[tuple[str, str]]:
    """How often each operator occurs, our own once per layer or name."""
    return Counter(
        (node.op_type, next((a.s.decode() for a in node.attribute if a.name == "layer"), ""))
        for node in graph.graph.node
    )
