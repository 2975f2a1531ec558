"""Rounding with error feedback on a number format's grid: GPTQ (arXiv 2210.17323, algorithm 1) for floating point.

Columns are rounded one after the other, and what rounding one of them does to the layer's output is taken back by the
columns that are still open, as far as the inputs' Gram matrix says that they can.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from exporter.plan import LayerPlan
from exporter.quantize import BlockStatistics, QuantizedWeight, expand_scales
from exporter.rounding import round_to_format
from plugins.formats import Format, get_format

DAMPING = 0.01
"""Added to the Gram matrix's diagonal, relative to its mean: GPTQ's own."""

# Columns whose errors are gathered before the open ones learn of them: enough for one matrix product to pay.
_COLUMNS = 128


@dataclass(frozen=True)
class ErrorFeedback:
    """How far a rounding error in one column is made good by the others: the upper Cholesky factor of the inverse Gram
    matrix [K, K], float64, its columns in `order` int64 [K], those with the largest inputs first (GPTQ's act-order);
    and `gram`, the matrix itself.
    """

    gram: Tensor
    factor: Tensor
    order: Tensor

    @classmethod
    def of(cls, gram: Tensor, damping: float = DAMPING) -> ErrorFeedback:
        """Factorize the inputs' Gram matrix [K, K], given in any unit, `damping` relative to its mean diagonal.

        Raises `ValueError` for a matrix that is not finite, or that the damping does not make positive definite.
        """
        diagonal = gram.diagonal().double()
        # Inputs that never occur leave the mean at 0; then any positive number does.
        damped = gram.double() + torch.diag(torch.full_like(diagonal, damping * float(diagonal.mean()) or 1.0))
        order = torch.argsort(diagonal, descending=True, stable=True)
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if int(failed) or not bool(lower.isfinite().all()):
            raise ValueError("the Gram matrix is not positive definite; more damping would make it so")
        return cls(gram, torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True), order)

    def round(self, weight: Tensor, scales: Tensor, fmt: Format) -> Tensor:
        """Return values float32 [N, K] on the format's grid in units of `scales` [N, G], for `weight` [N, K].

        Every zero is positive. Scales stay as they are, so that foldable ones stay foldable.
        """
        count = weight.shape[1]
        open_columns = weight[:, self.order].double()
        repeated = expand_scales(scales, count)[:, self.order].double()
        values = torch.empty_like(weight)
        for start in range(0, count, _COLUMNS):
            stop = min(start + _COLUMNS, count)
            block = slice(start, stop)
            rounded, errors = round_columns(open_columns[:, block], repeated[:, block], self.factor[block, block], fmt)
            values[:, self.order[block]] = rounded
            open_columns[:, stop:] -= errors @ self.factor[block, stop:]
        return values


def round_columns(columns: Tensor, scales: Tensor, factor: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Round `columns` [N, C] one by one, changing those behind: (values [N, C], errors over the diagonal [N, C]).

    On a GPU in one kernel, where Triton can compile it: else each column takes dozens of launches.
    """
    if columns.is_cuda and find_spec("triton") is not None:
        from exporter.cuda import error_feedback

        if error_feedback.compiles(columns.device):
            return error_feedback.round_columns(columns, scales, factor, fmt)
    values, errors = torch.empty(columns.shape, device=columns.device), torch.empty_like(columns)
    for index in range(columns.shape[1]):
        scale = scales[:, index]
        rounded = round_to_format((columns[:, index] / scale).float(), fmt).add_(0.0)
        error = (columns[:, index] - rounded.double() * scale) / factor[index, index]
        columns[:, index + 1 :] -= error.unsqueeze(1) * factor[index, index + 1 :]
        values[:, index], errors[:, index] = rounded, error
    return values, errors


def round_with_feedback(
    layer: LayerPlan, weight: Tensor, nearest: QuantizedWeight, feedback: ErrorFeedback
) -> tuple[QuantizedWeight, BlockStatistics]:
    """Round `weight` [N, K] again, with error feedback on the scales of `nearest`; and what that gained.

    It computes where `weight` and `feedback` are. Errors are the layer's output error on the inputs that this was made
    of, relative to its output's power. If it gained nothing, `nearest` stays.
    """
    begin = time.perf_counter()
    fmt = get_format(layer.weight_format)
    gram = feedback.gram
    values = feedback.round(weight, nearest.scales.to(weight), fmt)
    rounded = QuantizedWeight.from_values(values, nearest.scales, fmt, nearest.input_scale)
    power = _output_power(weight, gram) or 1.0
    before, after = (_output_power(one.dequantize(fmt).to(weight) - weight, gram) / power for one in (nearest, rounded))
    # Written so that a NaN counts as worse.
    kept = rounded if after < before else nearest
    seconds = time.perf_counter() - begin
    return kept, BlockStatistics(layer.name, before, after if after < before else before, seconds)


def _output_power(weight: Tensor, gram: Tensor) -> float:
    """Return the sum of squares of what `weight` [N, K] makes of the inputs behind `gram`."""
    return float((weight @ gram).mul_(weight).sum(dtype=torch.float64))
