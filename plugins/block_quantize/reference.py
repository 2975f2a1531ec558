"""What the block quantizers compute, in numpy, float32 throughout."""

from __future__ import annotations

import numpy as np

from plugins.block_scales import BlockScaling
from plugins.float_quantize.reference import TINY, quantize
from plugins.formats import Values
from plugins.weight import GroupError


def block_scales(amax: Values, scaling: BlockScaling, tensor_scale: np.float32 | None = None) -> Values:
    """A group's scale on the scaling's grid, float32 [...], without the tensor's scale; `amax` float32 [...].

    NVFP4: (amax / max) / tensor_scale, rounded to E4M3 as every format rounds: to nearest, saturating. Below half of
    the smallest E4M3 value that is 0. MXFP8: max(amax, TINY) / max, rounded up to a power of two as NVIDIA's
    conversions to E8M0 do, so that no value saturates (OCP's own example rounds down and saturates).
    """
    largest = np.float32(scaling.values.max)
    if scaling.has_tensor_scale:
        rounded: Values = scaling.scales.round(np.divide(amax, largest) / np.float32(tensor_scale))
        return rounded
    significand, exponent = np.frexp(np.maximum(amax, np.float32(TINY)) / largest)
    power: Values = np.ldexp(np.float32(1), exponent - (significand == np.float32(0.5))).astype(np.float32)
    return power


def quantize_blocks(x: Values, scaling: BlockScaling, tensor_scale: np.float32 | None = None) -> tuple[Values, Values]:
    """Grid values float32 [..., K] and scales float32 [..., K/G], the tensor's scale in them.

    A group whose scale is 0 becomes zeros. Raises GroupError where the groups do not divide K.
    """
    count = x.shape[-1]
    if count % scaling.group_size:
        raise GroupError(f"groups of {scaling.group_size} do not divide {count} values")
    grouped = x.reshape(*x.shape[:-1], -1, scaling.group_size)
    scales = block_scales(np.abs(grouped).max(axis=-1, keepdims=True), scaling, tensor_scale)
    if tensor_scale is not None:
        scales = scales * np.float32(tensor_scale)
    divisor = np.where(scales == 0, np.float32(np.inf), scales)
    return quantize(grouped, divisor, scaling.values).reshape(x.shape), scales[..., 0]


def expand_scales(scales: Values, count: int) -> Values:
    """Scales [..., G] repeated to [..., count]."""
    return np.repeat(scales, count // scales.shape[-1], axis=-1)
