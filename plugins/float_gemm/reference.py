"""What the low-bit linear computes, in numpy, float32 throughout."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from plugins.float_dequantize.reference import dequantize_values, per_group
from plugins.formats import Codes, Format, Values


def gemm(
    values: Values,
    codes: Codes,
    weight_scales: Values,
    fmt: Format,
    *,
    group_size: int = 0,
    x_scales: Values | None = None,
    multipliers: npt.NDArray[np.int32] | None = None,
    bias: Values | None = None,
) -> Values:
    """y float32 [..., N] of values [..., K] (grid values, or plain x for a weight-only layer) and codes uint8 [N, K].

    With channel scales [N, 1], and with group multipliers int32 [N, K/G] if given:
    y = (values @ (decode(codes)·multipliers)ᵀ)·x_scales·weight_scalesᵀ + bias.
    With group scales [N, K/G]: y = (values @ (decode(codes)·weight_scales)ᵀ)·x_scales + bias. With x_scales [..., K/G]
    they multiply the values before the product.
    Raises GroupError for scales or multipliers of another shape.
    """
    weight = fmt.decode(codes)
    scales_per_channel = group_size == 0 or multipliers is not None
    if multipliers is not None:
        weight = per_group(weight, multipliers.astype(np.float32), group_size)
    if not scales_per_channel:
        weight = per_group(weight, weight_scales, group_size)
    if x_scales is not None and x_scales.shape[-1] > 1:
        values, x_scales = dequantize_values(values, x_scales), None
    y: Values = np.matmul(values, weight.T, dtype=np.float32)
    if x_scales is not None:
        y = y * x_scales
    if scales_per_channel:
        y = per_group(y.reshape(-1, y.shape[-1]).T, weight_scales, 0).T.reshape(y.shape)
    return y if bias is None else y + bias
