"""Online per-token quantization for ONNX Runtime on a CPU: floats to uint8 numerators, bit for bit the reference's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from plugins.body import Body
from plugins.float_quantize.function_body import append_splitting
from plugins.float_quantize.reference import TINY
from plugins.formats import Format


def append_numerators(body: Body, x: gs.Tensor, fmt: Format) -> str:
    """x → "values" = numerators + zero point, uint8, and "scales" per numerator.

    scales is the reference's scale times the step, a power of two, so x / scales is bitwise the reference's quotient
    in units of the step. It never exceeds the largest numerator by more than rounding, so nothing is clipped but what
    is negative where the format has no sign. Returns the name of a scalar that is 1 at run time.
    """
    last = body.ints(-1)
    t = "x" if fmt.min else body.op("Max", "x", body.float(0.0))
    bounds = [body.op("ReduceMax", t, last, keepdims=1)]
    if fmt.min:
        bounds.append(body.op("Neg", body.op("ReduceMin", t, last, keepdims=1)))
    amax = body.op("Max", *bounds, body.float(TINY))
    body.op("Div", amax, body.float(fmt.max_numerator), output="scales")
    if fmt.is_uniform:
        _append_row_quantizer(body, x.shape, fmt)
    else:
        rounded = f"{body.prefix}rounded"
        append_splitting(body, body.op("Div", t, "scales"), rounded, fmt, 1.0)
        body.op("QuantizeLinear", rounded, body.float(1.0), zero_point(body, fmt), output="values")
    # ONNX Runtime fuses MatMulInteger, Cast and Mul into one kernel only if the factor is a product whose scalar is
    # unknown until run time; without it, a layer of 1152 × 4608 takes a tenth longer.
    return body.op("Clip", body.op("ReduceMin", "scales", keepdims=0), body.float(1.0), body.float(1.0))


def zero_point(body: Body, fmt: Format) -> str:
    """The numerators below 0, not 128: CPUs without VNNI add pairs of products in 16 bits, where 2·120·120 fits.

    An unsigned format has none below 0: UE2M4's largest pairs, 2·124·120, fit, too.
    """
    return body.constant(np.uint8(-fmt.min_numerator))


def _append_row_quantizer(body: Body, shape: Sequence[int | str] | None, fmt: Format) -> None:
    """x, scales → values in one pass: QuantizeLinear divides a matrix's rows by their own scales and rounds.

    The reshapes around it move nothing.
    """
    width = shape[-1] if shape is not None else None
    known = body.ints(-1, width) if isinstance(width, int) else None
    rows = body.op("Reshape", "x", known or body.op("Concat", body.ints(-1), body.op("Shape", "x", start=-1), axis=0))
    row_scales = body.op("Reshape", "scales", body.ints(-1))
    zeros = body.op("Expand", zero_point(body, fmt), body.op("Shape", row_scales))
    numbers = body.op("QuantizeLinear", rows, row_scales, zeros, axis=0)
    body.op("Reshape", numbers, body.op("Shape", "x"), output="values")
