"""The exported graph has one custom node per quantizer, dynamic batch, marked boundaries, and computes the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from exporter.models.inputs import TransformerInputs
from exporter.models.pixart import PixArtAdapter
from exporter.plan import LayerPlan, Plan
from exporter.quantize import quantize_model, round_to_nearest
from exporter.to_onnx import to_onnx
from exporter.tracing import OPSET
from plugins.formats import get_format
from plugins.op import DOMAIN

ADAPTER = PixArtAdapter()
TOKENS = 5


def tiny_pixart(*, micro_conditioned: bool, out_channels: int) -> nn.Module:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=out_channels,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        caption_channels=24,
        use_additional_conditions=micro_conditioned,
    )
    return model.eval().requires_grad_(False)


def quantize(model: nn.Module, activation_format: str) -> nn.Module:
    layers = []
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("transformer_blocks"):
            n, k = module.weight.shape
            layers.append(LayerPlan(name, n, k, True, "e2m1", activation_format, 16, "group", "fp32"))
            scales = module.weight.reshape(n, -1, 16).abs().amax(2) / 6
            weights[name] = round_to_nearest(module.weight, scales, get_format("e2m1"))
    return quantize_model(model, Plan(tuple(layers), (), 0, 0), weights)


def inputs(batch: int, seed: int) -> TransformerInputs:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, TOKENS)
    mask[0, 3:] = 0
    return TransformerInputs(
        hidden_states=torch.randn(batch, 4, 8, 8, generator=generator),
        timestep=torch.linspace(10, 900, batch),
        conditions={
            "encoder_hidden_states": torch.randn(batch, TOKENS, 24, generator=generator),
            "encoder_attention_mask": mask,
        },
    )


@pytest.mark.parametrize(("micro_conditioned", "out_channels"), [(False, 4), (True, 8)])
@pytest.mark.slow
def test_weight_only_graph_agrees_with_torch_at_every_batch_size(
    tmp_path: Path, micro_conditioned: bool, out_channels: int
) -> None:
    model = quantize(tiny_pixart(micro_conditioned=micro_conditioned, out_channels=out_channels), "none")
    example = ADAPTER.example_inputs(model, batch=2, tokens=TOKENS)
    to_onnx(model, ADAPTER, example, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    for batch in (1, 2, 5):
        wanted = ADAPTER.with_conditions(model, inputs(batch, seed=batch))
        session = onnxruntime.InferenceSession(_without_squeezes(graph), providers=["CPUExecutionProvider"])
        (found,) = session.run(["sample"], wanted.as_numpy())
        expected = ADAPTER.forward(model, wanted).numpy()
        assert found.shape == (batch, out_channels, 8, 8)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def _without_squeezes(graph: onnx.ModelProto) -> bytes:
    """What `drop_noop_squeezes` does, by hand: torch writes a no-op squeeze that no runtime takes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for node in copy.graph.node:
        if node.op_type == "Squeeze":
            node.op_type = "Identity"
            del node.input[1:]
    return copy.SerializeToString()


def text(node: onnx.NodeProto, attribute: str) -> str:
    return onnx.helper.get_node_attr_value(node, attribute).decode()


@pytest.mark.slow
def test_graph_has_the_waist_s_nodes_names_and_attributes(tmp_path: Path) -> None:
    model = quantize(tiny_pixart(micro_conditioned=False, out_channels=8), "e2m3")
    example = ADAPTER.example_inputs(model, batch=2, tokens=TOKENS)
    to_onnx(model, ADAPTER, example, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    ours = [node for node in graph.graph.node if node.domain == DOMAIN]
    kinds = Counter(node.op_type.split("_")[0] for node in ours)
    assert kinds["FloatQuantizeOnline"] == 20
    assert kinds["FloatDequantize"] == 40
    layers = {text(node, "layer") for node in ours if node.op_type.startswith("FloatQuantizeOnline")}
    assert layers == {n for n, m in model.named_modules() if type(m).__name__ == "QuantLinear"}
    marks = {text(node, "name") for node in ours if node.op_type == "FloatBoundary"}
    assert {"transformer_blocks.0.input", "transformer_blocks.0.output", "transformer_blocks.1.output"} <= marks
    assert {"blocks.encoder_hidden_states", "blocks.encoder_attention_mask", "blocks.timestep"} <= marks
    assert {entry.domain: entry.version for entry in graph.opset_import} == {"": OPSET, DOMAIN: 1}
    assert {function.name for function in graph.functions} == {node.op_type for node in ours}
    for value in (*graph.graph.input, *graph.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert "transformer_blocks.0.attn1.to_q.words" in {tensor.name for tensor in graph.graph.initializer}


def test_tracing_leaves_no_hooks_behind(tmp_path: Path) -> None:
    model = quantize(tiny_pixart(micro_conditioned=False, out_channels=8), "none")
    example = ADAPTER.example_inputs(model, batch=2, tokens=TOKENS)
    before = ADAPTER.forward(model, example)
    to_onnx(model, ADAPTER, example, tmp_path / "model.onnx")
    assert not any(block._forward_hooks or block._forward_pre_hooks for _, block in ADAPTER.blocks(model))
    assert torch.equal(ADAPTER.forward(model, example), before)
