"""A graph whose blocks were traced once per kind is the graph whose blocks were all traced."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from exporter.block_calls import NotRepeatedError
from exporter.block_kinds import block_facts
from exporter.models.adapter import Adapter
from exporter.models.dit import DiTAdapter
from exporter.models.hunyuan import HunyuanAdapter
from exporter.models.pixart import PixArtAdapter
from exporter.passes import WAIST_PASSES, run_passes
from exporter.passes.history import PassResult
from exporter.plan import LayerPlan, Plan
from exporter.quantize import quantize_model, round_to_nearest
from exporter.repeated_blocks import with_placeholders
from exporter.runtime import OnnxSession
from exporter.targets import get_target
from exporter.to_onnx import to_onnx
from plugins.formats import get_format
from tests.exporter.models.small_families import T5_TOKENS, dit, hunyuan, pixart, strengthen
from tests.exporter.progresses import Notes

FAMILIES: dict[str, Adapter] = {"pixart": PixArtAdapter(), "hunyuan": HunyuanAdapter(), "dit": DiTAdapter()}


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
    """With every linear of the blocks' attentions quantized, that called `odd` in another format than the rest."""
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
    notes = Notes()
    to_onnx(model, adapter, adapter.example_inputs(model, 2, T5_TOKENS), path, progress=notes, repeat=repeat)
    assert not notes.lines
    return run_passes(onnx.load(path), WAIST_PASSES, get_target("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_repeated_trace_is_the_whole_trace(family: str, tmp_path: Path) -> None:
    adapter = FAMILIES[family]
    model = quantized(model_of(family), adapter)
    (whole, whole_passes), (repeated, passes) = (exported(model, adapter, tmp_path, repeat=r) for r in (False, True))
    assert passes == whole_passes
    assert kinds_of_nodes(repeated) == kinds_of_nodes(whole)
    for batch in (1, 3):
        inputs = adapter.example_inputs(model, batch, T5_TOKENS).as_numpy()
        expected, found = (OnnxSession(graph).run(inputs)["sample"] for graph in (whole, repeated))
        np.testing.assert_array_equal(found, expected)


def kinds_of_nodes(graph: onnx.ModelProto) -> Counter[tuple[str, str]]:
    """How often each operator occurs, those of quantized layers for each layer."""
    layers = ({a.name: a.s.decode() for a in node.attribute if a.name == "layer"} for node in graph.graph.node)
    return Counter((node.op_type, layer.get("layer", "")) for node, layer in zip(graph.graph.node, layers, strict=True))


def test_blocks_are_alike_by_everything_but_their_numbers() -> None:
    adapter = PixArtAdapter()
    first, second = (block_facts(*block) for block in adapter.blocks(quantized(pixart(), adapter)))
    assert first == second
    model = pixart()
    model.transformer_blocks[1].attn1.scale = 0.5
    assert len({block_facts(*block) for block in adapter.blocks(model)}) == 2


def test_a_layer_in_another_format_makes_another_kind() -> None:
    adapter = PixArtAdapter()
    model = quantized(pixart(), adapter, odd="transformer_blocks.1.attn2.to_k")
    with pytest.raises(NotRepeatedError, match="no two blocks are alike"):
        with_placeholders(model, adapter.blocks(model))


def test_only_blocks_with_skips_have_the_parts_for_them() -> None:
    model = hunyuan(sizes=False, blocks=6)
    facts = [block_facts(*block) for block in HunyuanAdapter().blocks(model)]
    assert facts == [facts[0]] * 4 + [facts[4]] * 2
    assert facts[0] != facts[4]


def test_placeholders_leave_the_model_as_it_is() -> None:
    adapter = PixArtAdapter()
    model = quantized(pixart(), adapter)
    inputs = adapter.example_inputs(model, 2, T5_TOKENS)
    before = adapter.forward(model, inputs)
    with_placeholders(model, adapter.blocks(model))
    assert torch.equal(adapter.forward(model, inputs), before)
