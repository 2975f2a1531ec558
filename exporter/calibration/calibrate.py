"""Decide every quantized weight of a model: its scales, then its rounding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from exporter.calibration.block_inputs import BlockInputs
from exporter.calibration.finished import FinishedUnits, NothingKept
from exporter.calibration.first_rounding import feeds_back, largest_gram, looks_at_inputs
from exporter.calibration.input_parts import InputParts
from exporter.calibration.inputs import CalibrationRun
from exporter.calibration.layer_reconstruction import LayerError, reconstruct_layer
from exporter.calibration.layerwise import LayerUnits
from exporter.calibration.reconstruction import Execution, Unit, reconstruct
from exporter.calibration.rounding_linear import DecidedLinear, RoundingLinear
from exporter.errors import InputError
from exporter.method_section import MethodSection
from exporter.output_quantizer import quantize_outputs
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


def calibrate(
    model: nn.Module,
    plan: Plan,
    run: CalibrationRun,
    method: MethodSection,
    seed: int,
    progress: Progress,
    finished: FinishedUnits | None = None,
) -> CalibrationResult:
    """Quantize the planned linears of `model`, which stays as it is.

    Scales are searched with what the layers' inputs are like on the calibration set; then the weights are
    rounded to nearest ("rtn"), or with error feedback, layer by layer on the original network's inputs ("gptq"). For
    "fp4dit" one of these is the beginning, and the roundings of each block are learned jointly, block by block on the
    outputs of the network quantized so far, with the original network's outputs as targets. Units that an earlier run
    has `finished` are not done again. The same seed gives the same result on the same machine, however often it was
    interrupted and wherever the `run` keeps activations. The processes of a `run` that is shared out, which must share
    `finished`, call this together and all get the same result. Raises `InputError` where batches cannot be shared out
    evenly.
    """
    finished = finished or NothingKept()
    check_batches(method, len(run.calibration_set), run.shard)
    if method.name == "fp4dit" and method.compute == "bf16" and not run.placement.multiplies_bf16:
        progress.note(
            f"method.compute: {run.placement.device} multiplies BF16 by emulation only, which is slow; fp32 is faster "
            "here"
        )
    first = _first_roundings(model, plan, run, method, progress, finished)
    if method.name != "fp4dit":
        return first
    executed = run.order(model, [layer.name for layer in plan.layers])
    walk = _Walk(model, plan, first.weights, run, method, seed, progress, finished)
    # Each of them goes when the learned one is there.
    del first
    statistics = walk.through(executed)
    return CalibrationResult(walk.weights, statistics)


def _first_roundings(
    model: nn.Module,
    plan: Plan,
    run: CalibrationRun,
    method: MethodSection,
    progress: Progress,
    finished: FinishedUnits,
) -> CalibrationResult:
    """Every weight before anything is learned. What is known of the layers' inputs is gone afterwards."""
    inputs = None
    if feeds_back(method) or looks_at_inputs(plan, method):
        inputs = InputParts(model, plan.layers, run, largest_gram(plan, method))
        inputs.note_parts(progress)
    units = LayerUnits(model, plan, inputs, run.placement, progress, finished, run.shard)
    weights = units.nearest(method.scale_search)
    return units.with_feedback(weights) if feeds_back(method) else CalibrationResult(weights)


def check_batches(method: MethodSection, samples: int, shard: Shard) -> None:
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
        raise InputError(f"method.batch_size: {method.batch_size}, but there are only {samples} captured inputs for it")
    if math.gcd(samples, method.batch_size) % shard.world:
        raise InputError(
            f"calibration.samples: {samples} captured inputs cannot be shared out evenly among {shard.world} processes"
        )


class _Walk:
    """Goes through the model in its order of execution and learns one unit after the other.

    Of all weights there are codes and scales; dequantized copies, and what is learned of them, there are only of the
    unit whose turn it is. A layer that it has not come to is still the original's in the quantized network: what runs
    before does not see it.
    """

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
        # A GPU says itself when its memory does not suffice.
        memory = None if run.placement.on_gpu else run.memory
        self._execution = Execution(run.limit, shard=run.shard, bf16=method.compute == "bf16", memory=memory)
        self._quantized = share_copy(model)
        # The first roundings, in whose places the learned ones come.
        self.weights = {layer.name: weights[layer.name] for layer in plan.layers}
        if method.quantize_activations:
            quantize_outputs(self._quantized, plan.layers)

    def through(self, executed: list[str]) -> tuple[BlockStatistics, ...]:
        """Learn the layers in `executed` order, those of the blocks block by block."""
        blocks = self._run.adapter.blocks(self._model)
        inside = {name for name in executed if any(name.startswith(f"{block}.") for block, _ in blocks)}
        first = next((position for position, name in enumerate(executed) if name in inside), len(executed))
        before = [self._learn_layer(name) for name in executed[:first]]
        within = self._learn_blocks(blocks, shares_inputs=not before) if inside else []
        after = [self._learn_layer(name) for name in executed[first:] if name not in inside]
        return (*before, *within, *after)

    @contextmanager
    def _turn(self, name: str, layers: Sequence[LayerPlan]) -> Iterator[Unit]:
        """The block (or layer) `name` of the quantized network, with its planned `layers` to be learned; afterwards
        they are what was decided."""
        unit_layers = {}
        for layer in layers:
            linear, weight = planned_linear(self._model, layer), self.weights[layer.name]
            unit_layers[layer.name] = RoundingLinear(layer, linear, weight, self._method.quantize_activations)
            self._quantized.set_submodule(layer.name, unit_layers[layer.name])
        yield Unit(name, self._quantized.get_submodule(name), unit_layers)
        for layer in layers:
            linear, weight = planned_linear(self._model, layer), unit_layers[layer.name].quantized
            decided = DecidedLinear(layer, linear, weight, self._method.quantize_activations)
            self._quantized.set_submodule(layer.name, decided)
            self.weights[layer.name] = weight

    def _learn_layer(self, name: str) -> BlockStatistics:
        """Learn one layer outside the blocks on its own."""
        with self._turn(name, [layer for layer in self._plan.layers if layer.name == name]) as unit:
            found = self._restored(unit)
            if found is not None:
                return found
            original, quantized = (self._layer_inputs(network, name) for network in (self._model, self._quantized))

            def learn(_: torch.Generator, task: Task) -> BlockStatistics:
                error = LayerError.of(unit.layers[name], original, quantized, self._run.limit, self._run.shard)
                return reconstruct_layer(unit, error, self._method, task)

            return self._learn(unit, learn)

    def _layer_inputs(self, model: nn.Module, name: str) -> BlockInputs:
        inputs = self._run.layer_inputs(model, name)
        return BlockInputs(inputs, {}, {}, device=self._run.placement.device, weights=self._run.own_weights)

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
        statistics: list[BlockStatistics] = []
        skips = self._run.adapter.skips(self._model)
        wanted = {source for taken in skips.values() for source in taken.values()}
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        for name, block in blocks:
            given = {argument: kept.pop(source) for argument, source in skips.get(name, {}).items()}
            original = original.with_skips({argument: outputs[0] for argument, outputs in given.items()})
            quantized = quantized.with_skips({argument: outputs[1] for argument, outputs in given.items()})
            # The original's inputs are not needed any more: one tensor of all samples less.
            original = original.advanced(self._outputs(original, block))
            learned, outputs = self._through_block(name, quantized, original.hidden)
            statistics += learned
            quantized = quantized.advanced(outputs)
            if name in wanted:
                kept[name] = (original.hidden, quantized.hidden)
        return statistics

    def _through_block(
        self, name: str, inputs: BlockInputs, targets: Tensor
    ) -> tuple[tuple[BlockStatistics, ...], Tensor]:
        """Learn a block: its statistics, none where nothing of it is planned, and what it makes of its inputs then."""
        layers = [layer for layer in self._plan.layers if layer.name.startswith(f"{name}.")]
        with self._turn(name, layers) as unit:
            learned = (self._restored(unit) or self._learn_block(unit, inputs, targets),) if layers else ()
            return learned, self._outputs(inputs, unit.module)

    def _outputs(self, inputs: BlockInputs, module: nn.Module) -> Tensor:
        with self._run.placement.holds(module):
            return inputs.outputs(module, self._run.store, self._execution.forward)

    def _restored(self, unit: Unit) -> BlockStatistics | None:
        """Let the unit be as an earlier run left it; None if none has finished it."""
        found = self._finished.find(unit.name, self._layers_of(unit))
        if found is None:
            return None
        unit.restore(found.weights)
        (statistics,) = found.blocks
        return statistics

    def _learn_block(self, unit: Unit, inputs: BlockInputs, targets: Tensor) -> BlockStatistics:
        def learn(generator: torch.Generator, task: Task) -> BlockStatistics:
            return reconstruct(unit, inputs, targets, self._method, generator, self._execution, task)

        return self._learn(unit, learn)

    def _learn(self, unit: Unit, learn: Callable[[torch.Generator, Task], BlockStatistics]) -> BlockStatistics:
        generator = torch.Generator().manual_seed(_unit_seed(self._seed, unit.name))
        begun = self._progress.task(f"calibrate {unit.name}", self._method.iterations)
        with begun as task, self._run.placement.holds(unit.module):
            statistics = learn(generator, task)
        weights = {name: layer.quantized for name, layer in unit.layers.items()}
        learned = CalibrationResult(weights, (statistics,))
        # By all processes, and in main memory, where what was learned on a GPU is not yet.
        unit.restore(self._finished.keep(unit.name, self._layers_of(unit), learned).weights)
        return statistics

    def _layers_of(self, unit: Unit) -> list[LayerPlan]:
        return [layer for layer in self._plan.layers if layer.name in unit.layers]


def _unit_seed(seed: int, unit: str) -> int:
    """A seed of the unit's own, so that what it learns does not depend on whether this run has done those before it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {unit}".encode()).digest()[:8], "big")
