"""Learn the rounding of a linear layer that is a unit of its own, from sums over its inputs: an iteration costs one
product of the weight's size, however many samples there are, and sees all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.calibration.activations import BatchLimit
from exporter.calibration.adaround import Schedule
from exporter.calibration.block_inputs import BlockInputs
from exporter.calibration.reconstruction import ROUNDING_NOISE, Unit, keep_if_better
from exporter.calibration.rounding_linear import RoundingLinear
from exporter.calibration.transfers import on_device
from exporter.method_section import MethodSection
from exporter.progress import Task
from exporter.quantize import BlockStatistics
from exporter.shards import Shard


@dataclass(frozen=True)
class LayerError:
    """The squared error Σ‖Ŵ·q − W·x‖² of a layer as a function of its weight Ŵ [N, K], over tokens x of the original
    network and q of the network quantized so far (rounded as the layer rounds them), with e = q − x.

    It is written in D = Ŵ − W, so that what is small is no difference of large sums: `gram` Σqqᵀ [K, K], `pull`
    W·Σeqᵀ [N, K], and by output channel [N] `constant` Σ(W·e)² and `power` Σ(W·x + bias)². All are float64; `count` is
    how many outputs there are.
    """

    gram: Tensor
    pull: Tensor
    constant: Tensor
    power: Tensor
    count: int

    @classmethod
    @torch.no_grad()
    def of(
        cls, layer: RoundingLinear, original: BlockInputs, quantized: BlockInputs, limit: BatchLimit, shard: Shard
    ) -> LayerError:
        """Sum up the inputs of all samples, by all processes. The layer is on the inputs' device."""
        weight, device = layer.original.to(original.device), original.device
        rows, columns = weight.shape
        shapes = ((columns, columns), (rows, columns), (rows,), (rows,))
        sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]

        def add(part: slice) -> None:
            x = on_device(original.hidden, part, device)
            q = layer.quantized_input(on_device(quantized.hidden, part, device))
            root = original.roots(part, x.ndim)
            x, q, target = ((tensor * root).flatten(0, -2) for tensor in (x, q, layer.linear(x, weight)))
            off = (q - x) @ weight.T
            squares = (tensor.square().sum(dim=0, dtype=torch.float64) for tensor in (off, target))
            # Computed before anything is added, so that samples which do not fit the memory count once.
            added = [one.double() for one in (q.T @ q, off.T @ q, *squares)]
            for total, one in zip(sums, added, strict=True):
                total.add_(one)

        limit.each(len(original), original.tokens, add)
        count = shard.add_up(torch.tensor(len(original) * original.tokens * rows))
        gram, pull, constant, power = map(shard.add_up, sums)
        return cls(gram, pull, constant, power, int(count))

    def in_float32(self) -> LayerError:
        """The same, for learning."""
        return LayerError(self.gram.float(), self.pull.float(), self.constant.float(), self.power.float(), self.count)

    def gradient(self, moved: Tensor) -> Tensor:
        """Half of the error's derivative by the weight, at W + `moved`, both [N, K]."""
        return moved @ self.gram + self.pull

    def by_channel(self, moved: Tensor, gradient: Tensor) -> Tensor:
        """The error [N] at W + `moved`, from what `gradient` gave there."""
        return (moved * (gradient + self.pull)).sum(dim=1) + self.constant


@torch.no_grad()
def reconstruct_layer(unit: Unit, error: LayerError, method: MethodSection, task: Task) -> BlockStatistics:
    """Learn the rounding of the one layer of `unit`, as `reconstruct` learns a block's; every process does the same."""
    (layer,) = unit.layers.values()

    def error_now() -> float:
        moved = layer.dequantized.double() - layer.original.to(layer.dequantized).double()
        return float(error.by_channel(moved, error.gradient(moved)).sum()) / error.count

    def optimize(error_start: float) -> None:
        _optimize(layer, error, method, task.advance, error_start)

    power = float(error.power.sum()) / error.count
    return keep_if_better(unit, method, task, power or 1.0, error_now, optimize)


def _optimize(
    layer: RoundingLinear, error: LayerError, method: MethodSection, advance: Callable[[], None], error_start: float
) -> None:
    """Minimise error + penalty as blocks do, with the gradient written down. Channels without an error wait, too."""
    rounding = layer.start(method)
    optimizer = torch.optim.Adam([rounding.alpha], lr=method.learning_rate, fused=True)
    schedule = Schedule.of(method)
    original = layer.original.to(layer.dequantized)
    factor = 2 * rounding.alpha.numel() / (error_start * error.count)
    sums = error.in_float32()
    noise = ROUNDING_NOISE * sums.power
    for iteration in range(method.iterations):
        penalty = schedule.penalty(iteration)
        with torch.enable_grad():
            soft = rounding.soft_weight(penalty)
        moved = soft.detach() - original
        gradient = sums.gradient(moved)
        # Written so that a NaN counts as an error.
        counted = ~(sums.by_channel(moved, gradient) <= noise)
        if penalty is not None or bool(counted.any()):
            optimizer.zero_grad()
            soft.backward(gradient * counted.unsqueeze(1) * factor)  # type: ignore[no-untyped-call]
            optimizer.step()
        advance()
