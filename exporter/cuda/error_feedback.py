"""Error feedback (GPTQ) within some columns in one launch, where PyTorch's operations would take dozens a column."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from exporter.cuda import error_feedback_kernel
from exporter.rounding import exponent_below_first_code
from plugins.formats import Format, get_format

_ROWS = 8
_WARPS = 4


@cache
def compiles(device: torch.device) -> bool:
    """Whether Triton makes a kernel for this GPU: it needs a C compiler, and to know the GPU."""
    one = torch.ones(1, 1, dtype=torch.float64, device=device)
    try:
        round_columns(one, one, one, get_format("e2m1"))
    except (RuntimeError, TritonError):
        return False
    return True


def round_columns(columns: Tensor, scales: Tensor, factor: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Round `columns` float64 [N, C] on the grid of `fmt`, in units of `scales` float64 [N, C], one after the other.

    `factor` float64 [C, C] is these columns' block of the upper Cholesky factor. Returns (values float32 [N, C], errors
    over its diagonal float64 [N, C]); `columns` stay as they are. Bit for bit PyTorch's operations: none are fused.
    """
    rows, count = columns.shape
    values = torch.empty((rows, count), dtype=torch.float32, device=columns.device)
    errors = torch.empty((rows, count), dtype=torch.float64, device=columns.device)
    launch = error_feedback_kernel.round_columns[(triton.cdiv(rows, _ROWS),)]
    with torch.cuda.device(columns.device) if columns.is_cuda else nullcontext():
        launch(
            columns.contiguous(),
            scales.contiguous(),
            factor.contiguous(),
            values,
            errors,
            rows,
            count,
            LEAST=fmt.min,
            MOST=fmt.max,
            STEP=fmt.step,
            MIN_NORMAL=fmt.min_normal,
            MANTISSA_BITS=fmt.mantissa_bits,
            UNIFORM=fmt.is_uniform,
            FIRST_EXPONENT=exponent_below_first_code(fmt),
            ROWS=_ROWS,
            WIDTH=triton.next_power_of_2(count),
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return values, errors
