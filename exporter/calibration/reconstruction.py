"""Learn the roundings of one unit (a transformer block, or one layer) so that its output stays as it was.

Block reconstruction after BRECQ (arXiv 2102.05426), with FP4DiT's rounding (arXiv 2503.15465).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from exporter.calibration.activations import BatchLimit
from exporter.calibration.adaround import Penalty, Schedule
from exporter.calibration.block_inputs import BlockInputs
from exporter.calibration.gradient_memory import tokens_at_once
from exporter.calibration.placement import LEARNED_BLOCK, repeatable_gradients
from exporter.calibration.rounding_linear import RoundingLinear
from exporter.method_section import MethodSection
from exporter.progress import Task
from exporter.quantize import BlockStatistics, QuantizedWeight
from exporter.shards import Shard

# Where an output channel's error is below this share of its power, it is what float32 makes of the order of sums: 1e-15
# to 1e-14. What quantization leaves is orders of magnitude more, down to 1e-5 with 8 bits, less where a residual stream
# adds power without error.
ROUNDING_NOISE = 1e-12


@dataclass(frozen=True)
class Execution:
    """How units are run: on how many samples at once, alone and with what gradients need, and by which processes;
    with `bf16` the matrix products for gradients are in BF16. `memory` is how many bytes learning a unit may take,
    None for as many as it needs or the device has."""

    forward: BatchLimit = field(default_factory=BatchLimit)
    backward: BatchLimit = field(default_factory=BatchLimit.unlimited)
    shard: Shard = field(default_factory=Shard)
    bf16: bool = False
    memory: int | None = None

    def mean(self, total: float, count: int) -> float:
        """The quotient of sums over all processes, of which these are this one's."""
        totals = self.shard.add_up(torch.tensor([total, count], dtype=torch.float64))
        return float(totals[0] / totals[1])


@dataclass(frozen=True)
class Unit:
    """A block (or layer) whose planned linears are `layers`, by module path in the model."""

    name: str
    module: nn.Module
    layers: Mapping[str, RoundingLinear]

    def restore(self, weights: Mapping[str, QuantizedWeight]) -> None:
        """Compute with these weights from now on."""
        for name, layer in self.layers.items():
            layer.replace(weights[name])


def reconstruct(
    unit: Unit,
    inputs: BlockInputs,
    targets: Tensor,
    method: MethodSection,
    generator: torch.Generator,
    execution: Execution,
    task: Task,
) -> BlockStatistics:
    """Learn all roundings of `unit` jointly.

    `targets` [M, ...] are the original block's outputs on its original inputs, `inputs` come from the network that
    is quantized up to here. The unit is on the inputs' device. Several processes, each with its own samples of both,
    learn the same together. If what was learned is worse than the first roundings, these stay.
    """

    def error_now() -> float:
        return execution.mean(inputs.squared_error(unit.module, targets, execution.forward), targets.numel())

    def optimize(error_start: float) -> None:
        _optimize(unit, inputs, targets, method, generator, execution, task, error_start)

    power = execution.mean(inputs.square_sum(targets, execution.forward), targets.numel()) or 1.0
    return keep_if_better(unit, method, task, power, error_now, optimize)


def keep_if_better(
    unit: Unit,
    method: MethodSection,
    task: Task,
    power: float,
    error_now: Callable[[], float],
    optimize: Callable[[float], None],
) -> BlockStatistics:
    """Let `optimize` learn the unit's roundings, given the error of the first ones. If what was learned is worse by
    `error_now`, these stay. Errors are reported relative to `power`."""
    begin = time.perf_counter()
    error_start = error = error_now()
    if error_start > 0.0:
        optimize(error_start)
        before = {name: layer.decide(keep=True) for name, layer in unit.layers.items()}
        learned = error_now()
        # Written so that a NaN counts as worse.
        if learned < error_start:
            error = learned
        else:
            for name, layer in unit.layers.items():
                layer.replace(before[name])
    else:
        task.advance(method.iterations)
    return BlockStatistics(unit.name, error_start / power, error / power, time.perf_counter() - begin)


def _optimize(
    unit: Unit,
    inputs: BlockInputs,
    targets: Tensor,
    method: MethodSection,
    generator: torch.Generator,
    execution: Execution,
    task: Task,
    error_start: float,
) -> None:
    """Minimise reconstruction error + penalty.

    The squared error is divided by that of the first roundings and counted once per weight, so that the penalty's
    weight means the same for every model, layer and unit of measurement. Roundings that begin at the unrounded weight,
    in a unit that nothing before it has changed, make no error: there the gradient is noise, whose signs Adam would
    follow at full size. So output channels without an error do not count until the penalty has moved their weights.
    """
    roundings = [layer.start(method) for layer in unit.layers.values()]
    parameters = [rounding.alpha for rounding in roundings]
    optimizer = torch.optim.Adam(parameters, lr=method.learning_rate, fused=True)
    weights = sum(parameter.numel() for parameter in parameters)
    schedule = Schedule.of(method)
    shard = execution.shard
    count = int(shard.add_up(torch.tensor(len(inputs))))
    channels: Tensor | None = torch.zeros(targets.shape[-1])
    _limit_gradients(unit, inputs, targets, execution)
    for iteration in range(method.iterations):
        indices = draw_batch(count, method.batch_size, generator)
        own = indices[indices % shard.world == shard.rank] // shard.world
        factor = weights / error_start * len(own) / len(indices)
        penalty = schedule.penalty(iteration)
        if channels is not None:
            channels = _channels_with_error(unit, inputs, targets, own, execution)
        if channels is None or penalty is not None or bool(channels.any()):
            own_penalty = penalty if shard.is_first else None
            _backward(unit, inputs, targets, own, factor, own_penalty, execution, channels)
            for parameter in parameters:
                if parameter.grad is not None:
                    shard.add_up(parameter.grad)
            optimizer.step()
        task.advance()


def _channels_with_error(
    unit: Unit, inputs: BlockInputs, targets: Tensor, indices: Tensor, execution: Execution
) -> Tensor | None:
    """1 for every output channel that a batch has an error in, 0 for those with rounding noise; None if all have one.

    The samples at `indices` are this process's of the batch; all processes get the same.
    """
    sums = inputs.channel_errors(unit.module, targets, indices, execution.forward)
    errors, powers = execution.shard.add_up(sums)
    # Written so that a NaN counts as an error.
    channels = (~(errors <= ROUNDING_NOISE * powers)).to(targets.dtype)
    return None if bool(channels.all()) else channels


def _backward(
    unit: Unit,
    inputs: BlockInputs,
    targets: Tensor,
    indices: Tensor,
    factor: float,
    penalty: Penalty | None,
    execution: Execution,
    channels: Tensor | None,
) -> None:
    """Set the gradients of `factor` · squared error + penalty, of as many samples at once as memory takes."""
    limit = execution.backward

    def add(part: Tensor, *, with_penalty: bool) -> None:
        for layer in unit.layers.values():
            layer.penalty = penalty if with_penalty else None
        error = _mean_squared_error(unit, inputs, targets, part, execution, channels)
        loss = error * (factor * len(part) / len(indices))
        with repeatable_gradients():
            loss.backward()  # type: ignore[no-untyped-call]

    def add_all() -> None:
        for layer in unit.layers.values():
            layer.zero_grad(set_to_none=True)
        size = limit.samples(len(indices), inputs.tokens)
        for start in range(0, len(indices), size):
            add(indices[start : start + size], with_penalty=start == 0)

    while not limit.fits(limit.samples(len(indices), inputs.tokens), inputs.tokens, add_all):
        pass


def _mean_squared_error(
    unit: Unit,
    inputs: BlockInputs,
    targets: Tensor,
    indices: Tensor,
    execution: Execution,
    channels: Tensor | None = None,
) -> Tensor:
    """What is learned from, without the penalty, of the samples at `indices`."""
    # Products and what reads them directly, as a GELU; the residual stream, roundings and the loss stay FP32.
    with torch.autocast(inputs.device.type, torch.bfloat16) if execution.bf16 else nullcontext():
        return inputs.mean_squared_error(unit.module, targets, indices, channels)


def _limit_gradients(unit: Unit, inputs: BlockInputs, targets: Tensor, execution: Execution) -> None:
    """Let no more tokens be learned from at once than the memory has room for beside the unit's roundings."""
    if execution.memory is None:
        return

    def forward(samples: int) -> None:
        _mean_squared_error(unit, inputs, targets, torch.zeros(samples, dtype=torch.int64), execution)

    weights = sum(layer.dequantized.nbytes for layer in unit.layers.values())
    left = execution.memory - LEARNED_BLOCK * weights
    execution.backward.lower(tokens_at_once(forward, inputs.tokens, left))


def draw_batch(count: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Numbers int64 [batch_size] of samples of a set of `count`, every one as likely as every other.

    The set is taken as a whole as often as it fits. For the rest it is dealt out into as many hands as divide both
    numbers, sample after sample, and of every hand as many are drawn, none twice. So of processes whose number divides
    both, of which each has every n-th sample, each has its share of every batch.
    """
    whole, rest = divmod(batch_size, count)
    every = torch.arange(count).repeat(whole)
    if not rest:
        return every
    hands = math.gcd(count, rest)
    cards, drawn = count // hands, rest // hands
    if drawn == 1:
        chosen = (torch.rand(hands, generator=generator, dtype=torch.float64) * cards).long().unsqueeze(1)
    else:
        chosen = torch.rand(hands, cards, generator=generator, dtype=torch.float64).argsort(dim=1)[:, :drawn]
    return torch.cat([every, (torch.arange(hands).unsqueeze(1) + hands * chosen).flatten()])
