"""Block scaling: short groups along K, each with a scale that is itself a number of a small format.

NVFP4 has groups of 16 E2M1 values; a group's scale is an E4M3 value times one float32 of the whole tensor. MXFP8 (OCP
Microscaling 1.0) has groups of 32 E4M3 values, whose scale is a power of two, E8M0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from plugins.formats import Format, Values, get_format


@dataclass(frozen=True)
class BlockScaling:
    """One way of scaling: `group_size` values of `value_format` share a scale of `scale_format`.

    `has_tensor_scale`: scales are multiplied by a float32 that the whole tensor shares.
    """

    name: str
    group_size: int
    value_format: str
    scale_format: str
    has_tensor_scale: bool

    @property
    def values(self) -> Format:
        """The format of the values."""
        return get_format(self.value_format)

    @property
    def scales(self) -> Format:
        """The format of the scales."""
        return get_format(self.scale_format)

    @property
    def grid(self) -> npt.NDArray[np.float32]:
        """The scales' positive values, ascending."""
        magnitudes: npt.NDArray[np.float32] = self.scales.magnitudes
        return magnitudes[magnitudes > 0]


_TABLE = (
    BlockScaling("nvfp4", 16, "e2m1", "e4m3", has_tensor_scale=True),
    BlockScaling("mx", 32, "e4m3", "e8m0", has_tensor_scale=False),
)

BLOCK_SCALINGS: Mapping[str, BlockScaling] = MappingProxyType({entry.name: entry for entry in _TABLE})
"""Every block scaling by the name that recipes call it."""


def scaling_with(value_format: str, group_size: int, scale_format: str) -> BlockScaling | None:
    """The block scaling of these facts, None if there is none."""
    facts = (value_format, group_size, scale_format)
    return next((s for s in _TABLE if (s.value_format, s.group_size, s.scale_format) == facts), None)


def tensor_scale_of(amax: float, scaling: BlockScaling) -> float:
    """The tensor's scale for which its largest group gets the largest scale: amax / (max value · max scale)."""
    return amax / (scaling.values.max * scaling.scales.max)


def factor_scales(scales: Values, scaling: BlockScaling) -> tuple[np.float32, npt.NDArray[np.uint8]] | None:
    """Tensor scale and codes with decode(codes)·tensor_scale == scales, bit for bit; None where there are none.

    `scales` float32 [...]. Without a tensor scale that is 1. Every value of the scale format is tried for the largest
    scale, from the largest on.
    """
    fmt = scaling.scales
    largest = scales.max()
    if not np.isfinite(scales).all() or not scales.min() > 0:
        return None
    candidates = largest / scaling.grid[::-1] if scaling.has_tensor_scale else np.ones(1, np.float32)
    for tensor_scale in candidates:
        codes = fmt.encode(scales / tensor_scale)
        if np.array_equal(fmt.decode(codes) * tensor_scale, scales):
            return np.float32(tensor_scale), codes
    return None
