"""Every preset on every TensorRT target: lowered to what all its parsers take, or refused by the layer's name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from exporter.calibration.block_scales import choose_block_scales, static_scale
from exporter.calibration.scales import choose_scales
from exporter.container_choice import choose_container
from exporter.errors import InputError
from exporter.models.loading import load_transformer, model_shapes
from exporter.models.pixart import PixArtAdapter
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.layer_table import read_layer_table
from exporter.plan import LayerPlan, Plan, plan_layers
from exporter.presets import PRESETS
from exporter.quantize import QuantizedWeight, planned_linear, quantize_model, round_to_nearest
from exporter.recipe import Recipe
from exporter.targets import TARGETS
from exporter.to_onnx import to_onnx
from plugins.formats import get_format
from tests.exporter.conftest import TOKENS

DEVICES = [name for name, target in TARGETS.items() if target.engine != "onnxruntime"]
GROUP = 32


class Matrix:
    """The tiny model's waist graphs, traced once per preset and set of multipliers."""

    def __init__(self, job: Path, folder: Path) -> None:
        self.model = load_transformer(job / "model" / "transformer", "pixart")
        self.adapter = PixArtAdapter()
        self.folder = folder
        self.traced = cache(self._traced)

    def plan(self, preset: str, target: str) -> Plan:
        """The preset with groups that divide the tiny model's rows."""
        rules = [{"match": "transformer_blocks.*", "group": GROUP}] if PRESETS[preset].group_size == 128 else []
        recipe = {"model": {"weights": "w"}, "calibration": {"prompts": "p"}, "preset": preset, "layers": rules}
        shapes = model_shapes(self.model)
        return plan_layers(Recipe.model_validate(recipe), shapes, self.adapter.high_precision, TARGETS[target])

    def lowered(self, preset: str, target: str) -> onnx.ModelProto:
        """The graph that the target's engine is made of."""
        traced = self.traced(self.plan(preset, target).layers)
        passes = (*WAIST_PASSES, *lowering_passes(TARGETS[target]))
        return run_passes(traced, passes, TARGETS[target])[0]

    def _traced(self, layers: tuple[LayerPlan, ...]) -> onnx.ModelProto:
        plan = Plan(layers=layers, high_precision=(), fp32_bytes=0, expected_bytes=0)
        weights = {layer.name: _rounded(self.model, layer) for layer in layers}
        quantized = quantize_model(self.model, plan, weights)
        example = self.adapter.example_inputs(quantized, batch=2, tokens=TOKENS, resolution=4)
        path = self.folder / "traced.onnx"
        to_onnx(quantized, self.adapter, example, path)
        return onnx.load(path)


def _rounded(model: nn.Module, layer: LayerPlan) -> QuantizedWeight:
    fmt = get_format(layer.weight_format)
    weight = planned_linear(model, layer).weight.detach()
    factors = layer.multipliers if layer.scales == "foldable" else ()
    if layer.scaling is not None:
        static = static_scale(4.0, layer.scaling) if layer.scaling.has_tensor_scale else None
        return round_to_nearest(weight, choose_block_scales(weight, layer.scaling, "absmax"), fmt, static)
    with torch.no_grad():
        scales = choose_scales(weight, fmt, layer.group_size, "absmax", None, factors)
        return round_to_nearest(weight, scales, fmt)


@pytest.fixture(scope="module")
def matrix(tiny_job: Path, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tiny_job, tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_lowered_to_what_the_parsers_take_or_refused_by_name(
    matrix: Matrix, preset: str, target: str
) -> None:
    try:
        container = choose_container("layer", PRESETS[preset], 128, TARGETS[target])
    except InputError:
        with pytest.raises(
            InputError, match=rf"transformer_blocks\.0\.\S+: target {target} cannot run .*targets that can"
        ):
            matrix.plan(preset, target)
        return
    # `refuse_unsupported`, the last of the passes, checks every operator and every tensor's type.
    lowered = matrix.lowered(preset, target)
    assert {entry.container for entry in read_layer_table(lowered)} == {container}
    assert not lowered.functions
