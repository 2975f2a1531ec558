"""What becomes of group multipliers when a weight is packed for the kernels."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.packed_weights import CodedWeight, pack_weight


@pytest.mark.parametrize(
    ("container", "largest", "factors"),
    [("int8", 10, "multipliers"), ("int8", 11, "scales"), ("fp8", 11, "multipliers"), ("fp8", 128, "scales")],
)
def test_multipliers_that_a_kernel_cannot_take_become_scales(container: str, largest: int, factors: str) -> None:
    """In INT8 E2M1's numerators, up to 12, are multiplied by them before they are summed."""
    multipliers = np.array([[1, largest]], np.int32)
    scales = np.array([[0.25]], np.float32)
    weight = CodedWeight("e2m1", np.zeros((1, 256), np.uint8), scales, multipliers, 128)
    packed = pack_weight("layer", weight, container, "e2m3", has_bias=False)
    assert packed.variant.group_factors == factors
    assert (packed.multipliers is None) == (factors == "scales")
    assert packed.weight_scales.shape == ((1, 2) if factors == "scales" else (1, 1))
