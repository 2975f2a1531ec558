"""What the dequantizers compute, in numpy, float32 throughout."""

from __future__ import annotations

import numpy as np

from plugins.block_quantize.reference import expand_scales
from plugins.formats import Codes, Format, Values
from plugins.weight import GroupError


def dequantize_values(values: Values, scales: Values) -> Values:
    """values [..., K] · scales [..., 1] or [..., K/G], float32 [..., K]."""
    return np.multiply(values, expand_scales(scales, values.shape[-1]), dtype=np.float32)


def dequantize_codes(codes: Codes, scales: Values, fmt: Format, group_size: int) -> Values:
    """Weights float32 [N, K] from codes uint8 [N, K] and scales float32 [N, K/group_size].

    `group_size` 0 is a whole channel, scales [N, 1]. Raises GroupError.
    """
    return per_group(fmt.decode(codes), scales, group_size)


def per_group(matrix: Values, factors: Values, group_size: int) -> Values:
    """float32 [N, K] times factors [N, K/group_size], each of them for `group_size` neighbours along K."""
    rows, count = matrix.shape
    size = group_size or count
    if size < 1 or count % size or factors.shape != (rows, count // size):
        raise GroupError(
            f"[{rows}, {count}] in groups of {size} takes factors [{rows}, {count / max(size, 1):g}], "
            f"not {list(factors.shape)}"
        )
    grouped = matrix.reshape(rows, -1, size) * factors.astype(np.float32)[:, :, None]
    return grouped.reshape(rows, count)
