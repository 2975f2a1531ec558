"""Decide every quantized weight of a model: its scales, then its rounding."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from exporter.calibration.capture import CalibrationSet
from exporter.calibration.gptq import round_with_feedback
from exporter.calibration.inputs import BlockInputs, CalibrationRun, InputStatistics
from exporter.calibration.nearest import nearest_weight
from exporter.calibration.output_error import LARGEST_GRAM
from exporter.calibration.reconstruction import RoundingLinear, Unit, reconstruct
from exporter.calibration.scales import one_thread
from exporter.memory import release_mapped_weights
from exporter.models.adapter import Adapter
from exporter.models.prompts import Prompts
from exporter.plan import LayerPlan, Plan
from exporter.progress import Progress
from exporter.quantize import (
    BlockStatistics,
    CalibrationResult,
    QuantizedWeight,
    planned_linear,
    share_copy,
)
from exporter.recipe import MethodSection

# After so many layers the original's weights, which are not looked at again, leave the memory.
_LAYERS_AT_ONCE = 48


def calibrate(
    model: nn.Module,
    adapter: Adapter,
    plan: Plan,
    calibration_set: CalibrationSet,
    prompts: Prompts,
    method: MethodSection,
    seed: int,
    progress: Progress,
) -> CalibrationResult:
    """Quantize the planned linears of `model`, which stays as it is.

    Scales are searched with what the layers' inputs are like on the calibration set; then the weights are
    rounded to nearest ("rtn"), or with error feedback, layer by layer on the original network's inputs ("gptq"), or the
    roundings of each block are learned jointly ("fp4dit"), block by block on the outputs of the network quantized so
    far, with the original network's outputs as targets. The same seed gives the same result on the same machine.
    """
    run = CalibrationRun(adapter, calibration_set, prompts)
    inputs: Mapping[str, InputStatistics] = {}
    if method.name != "rtn" or _looks_at_inputs(plan, method):
        inputs = run.input_statistics(model, [layer.name for layer in plan.layers], _largest_gram(plan, method))
    weights = _nearest(model, plan, inputs, method, progress)
    if method.name == "rtn":
        return CalibrationResult(weights)
    if method.name == "gptq":
        return _with_feedback(model, plan, inputs, weights, progress)
    generator = torch.Generator().manual_seed(seed)
    walk = _Walk(model, plan, weights, run, method, generator, progress)
    statistics = walk.through(list(inputs))
    return CalibrationResult({name: layer.quantized for name, layer in walk.layers.items()}, statistics)


def _looks_at_inputs(plan: Plan, method: MethodSection) -> bool:
    """Whether rounding to nearest depends on the layers' inputs: by its search, or by a static scale of them."""
    static = any(layer.scaling is not None and layer.scaling.has_tensor_scale for layer in plan.layers)
    return static or method.scale_search != "absmax"


def _largest_gram(plan: Plan, method: MethodSection) -> int:
    """The longest rows whose Gram matrix is needed: error feedback takes that of all, the search of short ones."""
    if method.name == "gptq":
        return max((layer.in_features for layer in plan.layers), default=0)
    searched = method.scale_search == "output" and any(layer.scaling is None for layer in plan.layers)
    return LARGEST_GRAM if searched else 0


def _with_feedback(
    model: nn.Module,
    plan: Plan,
    inputs: Mapping[str, InputStatistics],
    weights: Mapping[str, QuantizedWeight],
    progress: Progress,
) -> CalibrationResult:
    """Round again with error feedback; a layer that never ran, so that its inputs are not known, stays as it is."""
    rounded, statistics = dict(weights), []
    with progress.task("error feedback", len(plan.layers)) as task:
        for layer in plan.layers:
            seen = inputs.get(layer.name)
            if seen is not None and seen.gram is not None:
                weight = planned_linear(model, layer).weight.detach()
                rounded[layer.name], gained = round_with_feedback(layer, weight, weights[layer.name], seen.gram)
                statistics.append(gained)
            task.advance()
    return CalibrationResult(rounded, tuple(statistics))


def _nearest(
    model: nn.Module, plan: Plan, inputs: Mapping[str, InputStatistics], method: MethodSection, progress: Progress
) -> dict[str, QuantizedWeight]:
    """One layer per core at a time: each works on its own in operations too small to be shared out."""

    def quantized(layer: LayerPlan) -> QuantizedWeight:
        with one_thread():
            weight = planned_linear(model, layer).weight.detach()
            return nearest_weight(weight, layer, inputs.get(layer.name), method.scale_search)

    cores = torch.get_num_threads()
    with progress.task("scales", len(plan.layers)) as task, ThreadPoolExecutor(cores) as pool:
        weights = {}
        for layer, weight in zip(plan.layers, pool.map(quantized, plan.layers), strict=True):
            weights[layer.name] = weight
            if len(weights) % _LAYERS_AT_ONCE == 0:
                release_mapped_weights()
            task.advance()
    return weights


class _Walk:
    """Goes through the model in its order of execution and learns one unit after the other."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        weights: Mapping[str, QuantizedWeight],
        run: CalibrationRun,
        method: MethodSection,
        generator: torch.Generator,
        progress: Progress,
    ) -> None:
        self._model, self._run = model, run
        self._method, self._generator, self._progress = method, generator, progress
        self._quantized = share_copy(model)
        self.layers: dict[str, RoundingLinear] = {}
        for layer in plan.layers:
            linear = planned_linear(model, layer)
            replaced = RoundingLinear(layer, linear, weights[layer.name], method.quantize_activations)
            self._quantized.set_submodule(layer.name, replaced)
            self.layers[layer.name] = replaced

    def through(self, executed: list[str]) -> tuple[BlockStatistics, ...]:
        """Learn the layers in `executed` order, those of the blocks block by block."""
        blocks = self._run.adapter.blocks(self._model)
        inside = {name for name in executed if any(name.startswith(f"{block}.") for block, _ in blocks)}
        first = next((position for position, name in enumerate(executed) if name in inside), len(executed))
        before = [self._learn_layer(name) for name in executed[:first]]
        within = self._learn_blocks(blocks, shares_inputs=not before) if inside else []
        after = [self._learn_layer(name) for name in executed[first:] if name not in inside]
        return (*before, *within, *after)

    def _learn_layer(self, name: str) -> BlockStatistics:
        """Learn one layer outside the blocks on its own."""
        original = BlockInputs(self._run.layer_inputs(self._model, name), {}, {})
        quantized = BlockInputs(self._run.layer_inputs(self._quantized, name), {}, {})
        targets = original.outputs(self._model.get_submodule(name))
        unit = Unit(name, self.layers[name], {name: self.layers[name]})
        return self._learn(unit, quantized, targets)[0]

    def _learn_blocks(self, blocks: list[tuple[str, nn.Module]], shares_inputs: bool) -> list[BlockStatistics]:
        """Learn the blocks, whose inputs are carried from one to the next instead of running the whole network.

        `shares_inputs` says that nothing before the blocks is quantized, so both networks give the first one the
        same inputs.
        """
        first = blocks[0][0]
        original = self._run.block_inputs(self._model, self._model.get_submodule(first))
        quantized = original
        if not shares_inputs:
            quantized = self._run.block_inputs(self._quantized, self._quantized.get_submodule(first))
        statistics = []
        skips = self._run.adapter.skips(self._model)
        wanted = {source for taken in skips.values() for source in taken.values()}
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        for name, block in blocks:
            given = {argument: kept.pop(source) for argument, source in skips.get(name, {}).items()}
            original = original.with_skips({argument: outputs[0] for argument, outputs in given.items()})
            quantized = quantized.with_skips({argument: outputs[1] for argument, outputs in given.items()})
            targets = original.outputs(block)
            layers = {path: layer for path, layer in self.layers.items() if path.startswith(f"{name}.")}
            unit = Unit(name, self._quantized.get_submodule(name), layers)
            if layers:
                block_statistics, outputs = self._learn(unit, quantized, targets)
                statistics.append(block_statistics)
            else:
                outputs = quantized.outputs(unit.module)
            if name in wanted:
                kept[name] = (targets, outputs)
            original, quantized = original.advanced(targets), quantized.advanced(outputs)
        return statistics

    def _learn(self, unit: Unit, inputs: BlockInputs, targets: Tensor) -> tuple[BlockStatistics, Tensor]:
        with self._progress.task(f"calibrate {unit.name}", self._method.iterations) as task:
            return reconstruct(unit, inputs, targets, self._method, self._generator, task)
