"""Quantized weights as the packed linear's kernels read them: words, scales of sums, multipliers of groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exporter.errors import InputError
from plugins.containers import INT8
from plugins.containers import multipliers as held_multipliers
from plugins.formats import Codes, get_format
from plugins.packed_linear.descriptor import PackedLinear
from plugins.token_quantize.reference import number_factor

_MAX_MULTIPLIER = np.iinfo(np.int8).max


@dataclass(frozen=True)
class CodedWeight:
    """A layer's weight before packing.

    `codes` uint8 [N, K]; `scales` float32 [N, 1], or [N, G] for free group scales; `multipliers` int32 [N, G] of the
    channel's scale, None where there are none. `group_size` 0 is the whole channel.
    """

    format: str
    codes: Codes
    scales: npt.NDArray[np.float32]
    multipliers: npt.NDArray[np.int32] | None
    group_size: int


@dataclass(frozen=True)
class PackedWeight:
    """An operator, for floats of FP32, and the constants among its inputs."""

    variant: PackedLinear
    words: npt.NDArray[np.int32]
    weight_scales: npt.NDArray[np.float32]
    multipliers: npt.NDArray[np.int8] | None


def pack_weight(
    layer: str, weight: CodedWeight, container: str, activation_format: str | None, *, has_bias: bool
) -> PackedWeight:
    """Pack for a container (``none`` and no activation format: weights alone).

    Every power of two between numbers and values is in the scales, exactly. Group multipliers beyond a byte, or with
    which a weight would leave INT8, become group scales. Raises `InputError` where FP32 does not hold a scale.
    """
    scales, multipliers = _scales(weight, container)
    variant = PackedLinear(
        weight_format=weight.format,
        container=container,
        float_type="fp32",
        n=len(weight.codes),
        k=weight.codes.shape[1],
        group_size=weight.group_size,
        group_factors="" if not weight.group_size else "scales" if multipliers is None else "multipliers",
        has_bias=has_bias,
    )
    # In INT8 both operands are numerators, in floats weights are values.
    unit = get_format(weight.format).step if container == INT8.name else 1.0
    if activation_format is not None:
        unit /= number_factor(get_format(activation_format), container)
    of_sums: npt.NDArray[np.float32] = scales * np.float32(unit)
    if not np.array_equal(of_sums / np.float32(unit), scales):
        raise InputError(
            f"{layer}: some of its weight scales are too small for {container} products in FP32; keep the "
            "layer in high precision with a rule `weight: none`"
        )
    return PackedWeight(variant, variant.layout.pack(weight.codes), of_sums, multipliers)


def _scales(weight: CodedWeight, container: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8] | None]:
    """The scales, per channel or per group, and the groups' multipliers."""
    if weight.multipliers is None:
        return weight.scales, None
    limit = _MAX_MULTIPLIER
    if container == INT8.name:
        # Kernels multiply decoded weights by them.
        limit = max(held_multipliers(get_format(weight.format), INT8), default=limit)
    if weight.multipliers.max() <= limit:
        return weight.scales, weight.multipliers.astype(np.int8)
    # A channel's scale has so few bits that its product with a multiplier is exact.
    return weight.scales * weight.multipliers.astype(np.float32), None
