"""Choose the weight format of layers that the recipe leaves open, by what the candidates cost the block's output."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.calibration.block_inputs import BlockInputs
from exporter.calibration.first_rounding import first_rounding, largest_gram
from exporter.calibration.input_parts import InputParts
from exporter.calibration.input_statistics import InputStatistics
from exporter.calibration.inputs import CalibrationRun
from exporter.calibration.nearest import input_scale
from exporter.calibration.placement import Placement
from exporter.files import write_text_atomically
from exporter.gate.snr import power_ratio_db
from exporter.gate.table import bounded_db
from exporter.method_section import MethodSection
from exporter.output_quantizer import quantize_outputs
from exporter.plan import LayerPlan, OpenLayer, Plan
from exporter.progress import Progress
from exporter.quantize import input_quantizer, planned_linear, share_copy
from exporter.rounding import InputQuantizer
from plugins.formats import get_format

# Samples that candidates are compared on: as many as have so many tokens, but not fewer than some.
_TOKENS = 1 << 12
_FEWEST_SAMPLES = 32


@dataclass(frozen=True)
class LayerFormats:
    """What the candidates of an open layer cost: format → squared error of the block's output relative to its power,
    with this layer's weight quantized and all inputs and outputs of the block's quantized layers as planned; and the
    formats that were `refused`, with the reason. `unit` is the block (for a layer outside the blocks the layer
    itself)."""

    layer: str
    unit: str
    errors: Mapping[str, float]
    refused: Mapping[str, str]

    @property
    def chosen(self) -> str:
        """The format with the least error, of equal ones the first; never one whose output is not finite."""
        return min(self.errors, key=lambda fmt: (not math.isfinite(self.errors[fmt]), self.errors[fmt]))

    @property
    def snr_db(self) -> dict[str, float]:
        """The errors in dB below the output's power."""
        return {fmt: bounded_db(power_ratio_db(1.0, error)) for fmt, error in self.errors.items()}


def save_formats(path: Path, found: tuple[LayerFormats, ...]) -> None:
    """Write the errors as JSON."""
    write_text_atomically(path, json.dumps([asdict(layer) for layer in found], indent=1) + "\n")


def load_formats(path: Path) -> tuple[LayerFormats, ...]:
    """Read back what `save_formats` wrote."""
    return tuple(LayerFormats(**entry) for entry in json.loads(path.read_text(encoding="utf-8")))


@torch.no_grad()
def choose_formats(
    model: nn.Module, plan: Plan, run: CalibrationRun, method: MethodSection, progress: Progress
) -> tuple[LayerFormats, ...]:
    """Try every candidate of every open layer in the original network, one layer's weight at a time.

    A candidate's weight is rounded as the method begins: to nearest or with error feedback, on scales searched over the
    whole calibration set. Then its block runs on some of the captured inputs. A layer that never runs keeps its first
    candidate.
    """
    inputs = InputParts(model, plan.layers, run, largest_gram(plan, method))
    inputs.note_parts(progress)
    executed = run.order(model, [layer.name for layer in plan.layers])
    opened = {layer.name: layer for layer in plan.open}
    found = {name: _not_run(layer) for name, layer in opened.items()}
    with progress.task("formats", len(opened)) as task:
        for unit, module, given, targets in _units(model, executed, opened, _some(run, model)):
            layers = [layer for layer in plan.layers if layer.name == unit or layer.name.startswith(f"{unit}.")]
            input_scales, candidates = _first_weights(model, layers, opened, inputs, method, run.placement)
            trial = _Trial(unit, module, layers, input_scales)
            power = given.square_sum(targets, run.limit) or 1.0
            for name, weights in candidates.items():
                errors = {}
                for fmt, weight in weights.items():
                    with trial.with_weight(name, weight), run.placement.holds(trial.module):
                        errors[fmt] = given.squared_error(trial.module, targets, run.limit) / power
                found[name] = LayerFormats(name, unit, errors, opened[name].refused)
                task.advance()
    return tuple(found.values())


class _TrialLinear(nn.Module):
    """A linear layer whose input is quantized as planned, with a weight [N, K] that can be exchanged."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, quantizer: InputQuantizer | None) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self._quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x if self._quantizer is None else self._quantizer.fake_quantize(x), self.weight, self.bias)


class _Trial:
    """A copy of a block, or of a layer outside the blocks, on which its planned `layers` can be tried."""

    def __init__(
        self, unit: str, module: nn.Module, layers: Sequence[LayerPlan], input_scales: Mapping[str, Tensor | None]
    ) -> None:
        self.module = share_copy(module)
        self.layers: dict[str, _TrialLinear] = {}
        for layer in layers:
            inside = layer.name.removeprefix(unit).removeprefix(".")
            linear = module.get_submodule(inside)
            assert isinstance(linear, nn.Linear)
            self.layers[layer.name] = _TrialLinear(linear, input_quantizer(layer, input_scales.get(layer.name)))
            if inside:
                self.module.set_submodule(inside, self.layers[layer.name])
            else:
                self.module = self.layers[layer.name]
        quantize_outputs(self.module, (layer for layer in layers if layer.name != unit), unit)

    @contextmanager
    def with_weight(self, name: str, weight: Tensor) -> Iterator[None]:
        """Let a layer have another weight for a while."""
        layer = self.layers[name]
        before, layer.weight = layer.weight, weight
        try:
            yield
        finally:
            layer.weight = before


def _not_run(layer: OpenLayer) -> LayerFormats:
    return LayerFormats(layer.name, layer.name, {layer.candidates[0].weight_format: 0.0}, layer.refused)


def _some(run: CalibrationRun, model: nn.Module) -> CalibrationRun:
    """The run on some of its samples, spread evenly over the set."""
    captured = run.calibration_set
    count = min(len(captured), max(_FEWEST_SAMPLES, _TOKENS // run.tokens(model)))
    chosen = torch.linspace(0, len(captured) - 1, count).round().long()
    weights = None if run.weights is None else run.weights[chosen]
    return replace(run, calibration_set=captured.at(chosen), weights=weights)


def _units(
    model: nn.Module, executed: Sequence[str], opened: Mapping[str, OpenLayer], run: CalibrationRun
) -> Iterator[tuple[str, nn.Module, BlockInputs, Tensor]]:
    """Name, module, inputs and outputs of every block that has open layers, and of open layers outside the blocks."""
    blocks = [name for name, _ in run.adapter.blocks(model)]
    inside = {name for name in opened if any(name.startswith(f"{block}.") for block in blocks)}
    for name in executed:
        if name in opened and name not in inside:
            linear = model.get_submodule(name)
            seen, device = run.layer_inputs(model, name), run.placement.device
            inputs = BlockInputs(seen, {}, {}, device=device, weights=run.own_weights)
            yield name, linear, inputs, _outputs(inputs, linear, run)
    if inside:
        for block, module, inputs, outputs in _blocks(model, run):
            if any(name.startswith(f"{block}.") for name in inside):
                yield block, module, inputs, outputs


def _blocks(model: nn.Module, run: CalibrationRun) -> Iterator[tuple[str, nn.Module, BlockInputs, Tensor]]:
    """Every block in order, its inputs carried from one to the next."""
    blocks, skips = run.adapter.blocks(model), run.adapter.skips(model)
    wanted = {source for taken in skips.values() for source in taken.values()}
    kept: dict[str, Tensor] = {}
    inputs = run.block_inputs(model, blocks[0][1])
    for name, block in blocks:
        inputs = inputs.with_skips({argument: kept.pop(source) for argument, source in skips.get(name, {}).items()})
        outputs = _outputs(inputs, block, run)
        yield name, block, inputs, outputs
        if name in wanted:
            kept[name] = outputs
        inputs = inputs.advanced(outputs)


def _outputs(inputs: BlockInputs, module: nn.Module, run: CalibrationRun) -> Tensor:
    with run.placement.holds(module):
        return inputs.outputs(module, run.store, run.limit)


def _first_weights(
    model: nn.Module,
    layers: Sequence[LayerPlan],
    opened: Mapping[str, OpenLayer],
    inputs: InputParts,
    method: MethodSection,
    placement: Placement,
) -> tuple[dict[str, Tensor | None], dict[str, dict[str, Tensor]]]:
    """Of a unit's layers, what is made of their inputs: the static scales of those that have one, by layer, and the
    weights that the open ones may begin with, by layer and format."""
    input_scales: dict[str, Tensor | None] = {}
    candidates: dict[str, dict[str, Tensor]] = {}
    for part, seen in inputs.of(layers):
        for layer in part:
            if layer.scaling is not None:
                input_scales[layer.name] = input_scale(layer.scaling, seen.get(layer.name))
        here = [opened[layer.name] for layer in part if layer.name in opened]
        rounded = _rounded(model, here, seen, method, placement)
        candidates.update((layer.name, weights) for layer, weights in zip(here, rounded, strict=True))
    return input_scales, candidates


def _rounded(
    model: nn.Module,
    layers: Sequence[OpenLayer],
    inputs: Mapping[str, InputStatistics],
    method: MethodSection,
    placement: Placement,
) -> list[dict[str, Tensor]]:
    """For every layer: format → its weight as it would begin, in main memory."""

    def rounded(candidate: LayerPlan) -> Tensor:
        weight = planned_linear(model, candidate).weight.detach().to(placement.device)
        seen = inputs.get(candidate.name)
        first = first_rounding(weight, candidate, None if seen is None else seen.to(placement.device), method)
        return first.dequantize(get_format(candidate.weight_format)).cpu()

    weights = placement.each(rounded, [candidate for layer in layers for candidate in layer.candidates])
    return [{candidate.weight_format: next(weights) for candidate in layer.candidates} for layer in layers]
