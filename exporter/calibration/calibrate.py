"""Decide every quantized weight of a model: its scales, then its rounding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from exporter.calibration.activations import ActivationStore
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.finished import FinishedUnits, NothingKept
from exporter.calibration.first_rounding import feeds_back, largest_gram, looks_at_inputs
from exporter.calibration.gptq import round_with_feedback
from exporter.calibration.input_statistics import InputStatistics
from exporter.calibration.inputs import BlockInputs, CalibrationRun
from exporter.calibration.nearest import nearest_weight
from exporter.calibration.reconstruction import Execution, RoundingLinear, Unit, reconstruct
from exporter.cores import on_every_core
from exporter.errors import InputError
from exporter.memory import release_mapped_weights
from exporter.method_section import MethodSection
from exporter.models.adapter import Adapter
from exporter.models.prompts import Prompts
from exporter.plan import LayerPlan, Plan
from exporter.progress import Progress, Task
from exporter.quantize import (
    BlockStatistics,
    CalibrationResult,
    QuantizedWeight,
    planned_linear,
    share_copy,
)
from exporter.shards import Shard

# So many layers' scales are a unit; after it their original weights, which are not looked at again, leave the memory.
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
    finished: FinishedUnits | None = None,
    store: ActivationStore | None = None,
    shard: Shard | None = None,
    sample_weights: Tensor | None = None,
) -> CalibrationResult:
    """Quantize the planned linears of `model`, which stays as it is.

    Scales are searched with what the layers' inputs are like on the calibration set; then the weights are
    rounded to nearest ("rtn"), or with error feedback, layer by layer on the original network's inputs ("gptq"). For
    "fp4dit" one of these is the beginning, and the roundings of each block are learned jointly, block by block on the
    outputs of the network quantized so far, with the original network's outputs as targets. Units that an earlier run
    has `finished` are not done again; activations are kept in `store`, without one in memory. `sample_weights` float32
    [M] are what errors on the samples count, without them all alike. The same seed gives the
    same result on the same machine, however often it was interrupted and wherever activations are. Several processes,
    which must share `finished`, call this together: each has its share of the samples, and all get the same result.
    Raises `InputError` where batches cannot be shared out evenly.
    """
    finished = finished or NothingKept()
    shard = shard or Shard()
    store = store or ActivationStore()
    run = CalibrationRun(adapter, calibration_set, prompts, store, shard=shard, weights=sample_weights)
    _check_batches(method, len(calibration_set), run.shard)
    inputs: Mapping[str, InputStatistics] = {}
    if method.name != "rtn" or looks_at_inputs(plan, method):
        inputs = run.input_statistics(model, [layer.name for layer in plan.layers], largest_gram(plan, method))
    weights = _nearest(model, plan, inputs, method, progress, finished, run.shard)
    if method.name == "rtn":
        return CalibrationResult(weights)
    if feeds_back(method):
        fed_back = _with_feedback(model, plan, inputs, weights, progress, finished, run.shard)
        if method.name == "gptq":
            return fed_back
        weights = fed_back.weights
    walk = _Walk(model, plan, weights, run, method, seed, progress, finished)
    statistics = walk.through(list(inputs))
    return CalibrationResult({name: layer.quantized for name, layer in walk.layers.items()}, statistics)


def _check_batches(method: MethodSection, samples: int, shard: Shard) -> None:
    """Raise `InputError` unless every process gets samples, and the same number of them of every batch."""
    if samples < shard.world:
        raise InputError(f"calibration.samples: {shard.world} processes have only {samples} inputs to share")
    if method.name != "fp4dit" or shard.world == 1:
        return
    if method.batch_size % shard.world:
        even = -(-method.batch_size // shard.world) * shard.world
        raise InputError(
            f"method.batch_size: {method.batch_size} samples cannot be shared out among {shard.world} processes; "
            f"nearest: {even}"
        )
    if samples < method.batch_size:
        raise InputError(f"method.batch_size: {method.batch_size}, but only {samples} inputs were captured for it")


def _with_feedback(
    model: nn.Module,
    plan: Plan,
    inputs: Mapping[str, InputStatistics],
    weights: Mapping[str, QuantizedWeight],
    progress: Progress,
    finished: FinishedUnits,
    shard: Shard,
) -> CalibrationResult:
    """Round again with error feedback; a layer that never ran, so that its inputs are not known, stays as it is."""

    def fed_back(layers: Sequence[LayerPlan], task: Task) -> CalibrationResult:
        rounded, statistics = {layer.name: weights[layer.name] for layer in layers}, []
        for layer in layers:
            seen = inputs.get(layer.name)
            if seen is not None and seen.gram is not None:
                weight = planned_linear(model, layer).weight.detach()
                rounded[layer.name], gained = round_with_feedback(layer, weight, weights[layer.name], seen.gram)
                statistics.append(gained)
            task.advance()
        return CalibrationResult(rounded, tuple(statistics))

    return _some_layers_at_once("error feedback", plan, fed_back, progress, finished, shard)


def _nearest(
    model: nn.Module,
    plan: Plan,
    inputs: Mapping[str, InputStatistics],
    method: MethodSection,
    progress: Progress,
    finished: FinishedUnits,
    shard: Shard,
) -> Mapping[str, QuantizedWeight]:
    def quantized(layer: LayerPlan) -> QuantizedWeight:
        weight = planned_linear(model, layer).weight.detach()
        return nearest_weight(weight, layer, inputs.get(layer.name), method.scale_search)

    def nearest(layers: Sequence[LayerPlan], task: Task) -> CalibrationResult:
        weights = {}
        for layer, weight in zip(layers, on_every_core(quantized, layers), strict=True):
            weights[layer.name] = weight
            task.advance()
        release_mapped_weights()
        return CalibrationResult(weights)

    return _some_layers_at_once("scales", plan, nearest, progress, finished, shard).weights


def _some_layers_at_once(
    title: str,
    plan: Plan,
    work: Callable[[Sequence[LayerPlan], Task], CalibrationResult],
    progress: Progress,
    finished: FinishedUnits,
    shard: Shard,
) -> CalibrationResult:
    """`work` on all planned layers, `_LAYERS_AT_ONCE` as a unit, by the first process."""
    weights: dict[str, QuantizedWeight] = {}
    statistics: list[BlockStatistics] = []
    with progress.task(title, len(plan.layers)) as task:
        for start in range(0, len(plan.layers), _LAYERS_AT_ONCE):
            layers = plan.layers[start : start + _LAYERS_AT_ONCE]
            unit = finished.find(title, layers)
            if unit is None:
                unit = finished.keep(title, layers, work(layers, task) if shard.is_first else CalibrationResult({}))
            else:
                task.advance(len(layers))
            weights.update(unit.weights)
            statistics.extend(unit.blocks)
    return CalibrationResult(weights, tuple(statistics))


class _Walk:
    """Goes through the model in its order of execution and learns one unit after the other."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        weights: Mapping[str, QuantizedWeight],
        run: CalibrationRun,
        method: MethodSection,
        seed: int,
        progress: Progress,
        finished: FinishedUnits,
    ) -> None:
        self._model, self._plan, self._run = model, plan, run
        self._method, self._seed, self._progress, self._finished = method, seed, progress, finished
        self._execution = Execution(run.limit, shard=run.shard)
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
        unit = Unit(name, self.layers[name], {name: self.layers[name]})
        found = self._restored(unit)
        if found is not None:
            return found
        original = self._layer_inputs(self._model, name)
        targets = self._outputs(original, self._model.get_submodule(name))
        return self._learn(unit, self._layer_inputs(self._quantized, name), targets)

    def _layer_inputs(self, model: nn.Module, name: str) -> BlockInputs:
        return BlockInputs(self._run.layer_inputs(model, name), {}, {}, weights=self._run.own_weights)

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
            # The original's inputs are not needed any more: one tensor of all samples less.
            original = original.advanced(self._outputs(original, block))
            layers = {path: layer for path, layer in self.layers.items() if path.startswith(f"{name}.")}
            unit = Unit(name, self._quantized.get_submodule(name), layers)
            if layers:
                statistics.append(self._restored(unit) or self._learn(unit, quantized, original.hidden))
            quantized = quantized.advanced(self._outputs(quantized, unit.module))
            if name in wanted:
                kept[name] = (original.hidden, quantized.hidden)
        return statistics

    def _outputs(self, inputs: BlockInputs, module: nn.Module) -> Tensor:
        return inputs.outputs(module, self._run.store, self._execution.forward)

    def _restored(self, unit: Unit) -> BlockStatistics | None:
        """Let the unit be as an earlier run left it; None if none has finished it."""
        found = self._finished.find(unit.name, self._layers_of(unit))
        if found is None:
            return None
        unit.restore(found.weights)
        (statistics,) = found.blocks
        return statistics

    def _learn(self, unit: Unit, inputs: BlockInputs, targets: Tensor) -> BlockStatistics:
        generator = torch.Generator().manual_seed(_unit_seed(self._seed, unit.name))
        with self._progress.task(f"calibrate {unit.name}", self._method.iterations) as task:
            statistics = reconstruct(unit, inputs, targets, self._method, generator, self._execution, task)
        weights = {name: layer.quantized for name, layer in unit.layers.items()}
        learned = CalibrationResult(weights, (statistics,))
        unit.restore(self._finished.keep(unit.name, self._layers_of(unit), learned).weights)
        return statistics

    def _layers_of(self, unit: Unit) -> list[LayerPlan]:
        return [layer for layer in self._plan.layers if layer.name in unit.layers]


def _unit_seed(seed: int, unit: str) -> int:
    """A seed of the unit's own, so that what it learns does not depend on whether this run has done those before it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {unit}".encode()).digest()[:8], "big")
