"""What a container's numbers mean."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from exporter.passes.encodings import decode, unit_of
from plugins.containers import CONTAINERS, FP8, fits, rounds_alike
from plugins.formats import ACTIVATION_FORMATS, get_format

HELD = [
    (name, container)
    for name in ACTIVATION_FORMATS
    for container in ("int8", "fp8")
    if fits(get_format(name), CONTAINERS[container])
]


@pytest.mark.parametrize(("name", "container"), HELD)
def test_every_value_is_a_number_of_the_container_times_the_unit(name: str, container: str) -> None:
    fmt, holds = get_format(name), CONTAINERS[container]
    values = fmt.values[fmt.valid]
    numbers = (values / np.float32(unit_of(fmt, container))).astype(holds.dtype)
    assert np.array_equal(decode(numbers, fmt, container), values)
    if container == "int8":
        shifted = (numbers.astype(np.int32) - fmt.min_numerator).astype(np.uint8)
        assert np.array_equal(decode(shifted, fmt, "uint8"), values)
    else:
        assert np.array_equal(decode(numbers.view(np.uint8), fmt, "fp8"), values)


def test_conversion_to_e4m3_rounds_e2m3() -> None:
    fmt = get_format("e2m3")
    assert rounds_alike(fmt, FP8)
    assert unit_of(fmt, "fp8") == 64
    x = np.random.default_rng(0).uniform(-fmt.max, fmt.max, 200_000).astype(np.float32)
    numbers = (x / np.float32(64)).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(decode(numbers, fmt, "fp8"), fmt.round(x))


def test_format_that_does_not_fit_has_no_unit() -> None:
    with pytest.raises(ValueError, match="e3m4"):
        unit_of(get_format("e3m4"), "fp8")


def test_unknown_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match="int4"):
        decode(np.zeros(3, np.int8), get_format("e2m3"), "int4")
