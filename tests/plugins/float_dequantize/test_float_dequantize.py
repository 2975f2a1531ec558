"""The dequantizers: their reference against a plain formula, and their function bodies bit for bit against it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from plugins.float_dequantize.reference import dequantize_codes, dequantize_values
from plugins.formats import WEIGHT_FORMATS, UnknownFormatError, get_format
from plugins.op import DequantizeValues, DequantizeWeight
from plugins.packing import pack
from plugins.weight import GroupError

Run = Callable[..., list[np.ndarray]]


def weight(name: str, rows: int, count: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    fmt = get_format(name)
    codes = generator.choice(np.flatnonzero(fmt.valid), (rows, count)).astype(np.uint8)
    groups = count // group_size if group_size else 1
    return codes, np.exp2(generator.uniform(-9, 0, (rows, groups))).astype(np.float32)


@pytest.mark.parametrize("group_size", [0, 1, 8, 24])
def test_reference_is_value_times_scale(group_size: int) -> None:
    codes, scales = weight("e2m1", 5, 24, group_size)
    expected = get_format("e2m1").values[codes] * np.repeat(scales, 24 // scales.shape[1], axis=1)
    assert np.array_equal(dequantize_codes(codes, scales, get_format("e2m1"), group_size), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["codes", "words"])
@pytest.mark.parametrize("group_size", [0, 10])
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_body_equals_the_reference(name: str, group_size: int, packed: bool, run_variant: Run) -> None:
    codes, scales = weight(name, 6, 50, group_size)
    stored = pack(codes, get_format(name).bits) if packed else codes
    [w] = run_variant(DequantizeWeight(name, group_size, 50, packed), stored, scales)
    expected = dequantize_codes(codes, scales, get_format(name), group_size)
    assert w.dtype == np.float32
    assert np.array_equal(w.view(np.uint32), expected.view(np.uint32))


def test_values_times_scales(run_variant: Run) -> None:
    generator = np.random.default_rng(0)
    values = get_format("e2m3").round(generator.standard_normal((2, 3, 16)))
    scales = generator.uniform(0.1, 1, (2, 3, 1)).astype(np.float32)
    [x_hat] = run_variant(DequantizeValues(), values, scales)
    assert np.array_equal(x_hat, dequantize_values(values, scales))
    assert np.array_equal(x_hat, values * scales)


@pytest.mark.parametrize(("shape", "group_size"), [((4, 3), 0), ((4, 1), 8), ((3, 2), 12), ((4, 2), 7)])
def test_scales_of_another_shape_are_refused(shape: tuple[int, int], group_size: int) -> None:
    with pytest.raises(GroupError, match=r"\[4, 24\] in groups of"):
        dequantize_codes(np.zeros((4, 24), np.uint8), np.ones(shape, np.float32), get_format("e2m1"), group_size)


def test_groups_must_divide_the_inputs() -> None:
    with pytest.raises(GroupError, match="groups of 128 do not divide 1100 input features; nearest: 110"):
        DequantizeWeight("e2m1", 128, 1100, packed=False)
    with pytest.raises(GroupError, match="groups of -8"):
        DequantizeWeight("e2m1", -8, 64, packed=False)
    with pytest.raises(GroupError, match="at least one input feature"):
        DequantizeWeight("e2m1", 0, 0, packed=False)


def test_formats_that_are_not_for_weights_are_refused() -> None:
    with pytest.raises(UnknownFormatError, match="'e8m0' is no weight format"):
        DequantizeWeight("e8m0", 0, 8, packed=False)
    with pytest.raises(UnknownFormatError, match="did you mean"):
        DequantizeWeight("e2m9", 0, 8, packed=False)


def test_attributes_are_all_explicit() -> None:
    assert DequantizeWeight("e2m1", 128, 1152, packed=True).attributes(layer="proj") == {
        "layer": "proj",
        "format": "e2m1",
        "group_size": 128,
        "count": 1152,
        "packed": 1,
        "container": "auto",
        "plugin_namespace": "fp4export",
        "plugin_version": "1",
    }
