"""The low-bit linear: reference and function bodies against the dequantized product in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from plugins.block_quantize.reference import quantize_blocks
from plugins.block_scales import BLOCK_SCALINGS
from plugins.containers import INT8, multipliers
from plugins.float_gemm.reference import gemm
from plugins.float_quantize.reference import quantize_online
from plugins.formats import UnknownFormatError, get_format
from plugins.op import Gemm
from plugins.packing import pack
from plugins.weight import GroupError

Run = Callable[..., list[np.ndarray]]
ROWS, COUNT, GROUP = 12, 48, 16

PAIRS = [("e2m1", "e2m3"), ("e1m2", "e4m3"), ("e3m0", "e3m4"), ("e2m3", "none"), ("int4", "int8"), ("e4m3", "none")]
GROUPING = [(0, False), (GROUP, False), (GROUP, True)]
VARIANTS = [
    Gemm(weight, activation, group, COUNT, has_multipliers, packed, has_bias)
    for (weight, activation), (group, has_multipliers), packed, has_bias in itertools.product(
        PAIRS, GROUPING, [False, True], [False, True]
    )
] + [
    Gemm(entry.value_format, entry.value_format, entry.group_size, 96, False, packed, True, entry)
    for entry, packed in itertools.product(BLOCK_SCALINGS.values(), [False, True])
]


@dataclass(frozen=True)
class Case:
    """Operands of one linear, and its result in float64 with a bound on float32's error."""

    variant: Gemm
    inputs: dict[str, np.ndarray]
    codes: np.ndarray
    exact: np.ndarray
    tolerance: np.ndarray

    def reference(self) -> np.ndarray:
        return gemm(
            self.inputs[self.variant.input_names[0]],
            self.codes,
            self.inputs["weight_scales"],
            get_format(self.variant.weight_format),
            group_size=self.variant.group_size,
            x_scales=self.inputs.get("x_scales"),
            multipliers=self.inputs.get("multipliers"),
            bias=self.inputs.get("bias"),
        )


def make_case(variant: Gemm, *, unit_scales: bool = False) -> Case:
    generator = np.random.default_rng(3)
    fmt = get_format(variant.weight_format)
    codes = generator.choice(np.flatnonzero(fmt.valid), (ROWS, variant.count)).astype(np.uint8)
    groups = variant.count // variant.group_size if variant.group_size else 1
    x = generator.standard_normal((2, 5, variant.count)).astype(np.float32)
    scale_groups = groups if variant.has_group_scales else 1
    scales = np.exp2(generator.uniform(-9, -3, (ROWS, scale_groups))).astype(np.float32)
    inputs = {"weight_scales": np.ones_like(scales) if unit_scales else scales}
    weight = fmt.values[codes].astype(np.float64) * np.repeat(
        inputs["weight_scales"].astype(np.float64), variant.count // scale_groups, axis=1
    )
    if variant.has_multipliers:
        allowed = multipliers(fmt, INT8) or (1, 2, 3)
        inputs["multipliers"] = generator.choice(allowed, (ROWS, groups)).astype(np.int32)
        weight = weight * np.repeat(inputs["multipliers"], variant.group_size, axis=1)
    x_hat = x.astype(np.float64)
    if variant.scaling is not None:
        tensor_scale = np.float32(np.abs(x).max() / 1000) if variant.scaling.has_tensor_scale else None
        values, x_scales = quantize_blocks(x, variant.scaling, tensor_scale)
        inputs |= {"values": values, "x_scales": x_scales}
        x_hat = values.astype(np.float64) * np.repeat(x_scales.astype(np.float64), variant.group_size, axis=-1)
    elif variant.quantizes_activations:
        values, x_scales = quantize_online(x, get_format(variant.activation_format))
        x_scales = np.ones_like(x_scales) if unit_scales else x_scales
        inputs |= {"values": values, "x_scales": x_scales}
        x_hat = values.astype(np.float64) * x_scales
    else:
        inputs["x"] = x
    inputs["words" if variant.packed else "codes"] = pack(codes, fmt.bits) if variant.packed else codes
    bias = generator.standard_normal(ROWS).astype(np.float32) if variant.has_bias else np.zeros(ROWS, np.float32)
    if variant.has_bias:
        inputs["bias"] = bias
    magnitude = np.abs(x_hat) @ np.abs(weight).T + np.abs(bias)
    tolerance = (variant.count + 4) * np.finfo(np.float32).eps / 2 * magnitude
    return Case(variant, inputs, codes, x_hat @ weight.T + bias, tolerance)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.op_type)
def test_reference_is_the_dequantized_product(variant: Gemm) -> None:
    case = make_case(variant)
    y = case.reference()
    assert y.dtype == np.float32
    assert y.shape == (2, 5, ROWS)
    assert (np.abs(y - case.exact) <= case.tolerance).all()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.op_type)
def test_body_is_the_dequantized_product(variant: Gemm, run_variant: Run) -> None:
    case = make_case(variant)
    [y] = run_variant(variant, *(case.inputs[name] for name in variant.input_names))
    assert y.dtype == np.float32
    assert y.shape == (2, 5, ROWS)
    assert (np.abs(y - case.exact) <= case.tolerance).all()


@pytest.mark.parametrize("has_multipliers", [False, True])
@pytest.mark.parametrize("weight", ["e2m1", "e1m2", "e3m0", "e2m3", "int4"])
def test_integer_products_are_exact(weight: str, has_multipliers: bool, run_variant: Run) -> None:
    """With scales of one everything is an integer times a power of two, small enough for float32."""
    variant = Gemm(weight, "e2m3", GROUP if has_multipliers else 0, COUNT, has_multipliers, True, False)
    case = make_case(variant, unit_scales=True)
    [y] = run_variant(variant, *(case.inputs[name] for name in variant.input_names))
    assert np.array_equal(y, case.exact)
    assert np.array_equal(case.reference(), case.exact)


def test_foldable_scales_equal_the_group_scales_they_came_from() -> None:
    """scale_group = scale_channel · m, exactly: both variants are the same layer."""
    folded = make_case(Gemm("e2m1", "e2m3", GROUP, COUNT, True, False, False))
    group_scales = folded.inputs["weight_scales"] * folded.inputs["multipliers"].astype(np.float32)
    y = gemm(
        folded.inputs["values"],
        folded.codes,
        group_scales,
        get_format("e2m1"),
        group_size=GROUP,
        x_scales=folded.inputs["x_scales"],
    )
    assert (np.abs(y - folded.exact) <= folded.tolerance).all()


def test_a_wrong_scale_is_noticed() -> None:
    """The tolerance of these tests is far below one wrong multiplier."""
    case = make_case(Gemm("e2m1", "e2m3", GROUP, COUNT, True, False, True))
    case.inputs["multipliers"][0, 0] += 1
    assert (np.abs(case.reference() - case.exact) > case.tolerance)[..., 0].any()


@pytest.mark.parametrize(
    ("group_size", "scales", "factors"),
    [(0, (ROWS, 3), None), (GROUP, (ROWS, 1), None), (GROUP, (ROWS, 3), (ROWS, 3)), (GROUP, (ROWS, 1), (ROWS, 2))],
)
def test_shapes_that_do_not_belong_together_are_refused(
    group_size: int, scales: tuple[int, int], factors: tuple[int, int] | None
) -> None:
    with pytest.raises(GroupError, match="takes factors"):
        gemm(
            np.zeros((2, COUNT), np.float32),
            np.zeros((ROWS, COUNT), np.uint8),
            np.ones(scales, np.float32),
            get_format("e2m1"),
            group_size=group_size,
            multipliers=None if factors is None else np.ones(factors, np.int32),
        )


def test_variants_that_make_no_sense_are_refused() -> None:
    with pytest.raises(GroupError, match="multipliers belong to groups"):
        Gemm("e2m1", "e2m3", 0, 64, has_multipliers=True, packed=False, has_bias=False)
    with pytest.raises(GroupError, match="nearest: 32"):
        Gemm("e2m1", "e2m3", 30, 64, has_multipliers=False, packed=False, has_bias=False)
    with pytest.raises(UnknownFormatError, match="'e3m0' is no activation format; valid: none, e2m1"):
        Gemm("e2m1", "e3m0", 0, 64, has_multipliers=False, packed=False, has_bias=False)
    with pytest.raises(UnknownFormatError, match="did you mean 'e2m3'"):
        Gemm("e2m1", "e2m4", 0, 64, has_multipliers=False, packed=False, has_bias=False)


def test_attributes_are_all_explicit() -> None:
    variant = Gemm("e2m1", "e2m3", 128, 1152, has_multipliers=True, packed=True, has_bias=True)
    assert variant.attributes(layer="ff.net.2", container="int8") == {
        "layer": "ff.net.2",
        "weight_format": "e2m1",
        "activation_format": "e2m3",
        "group_size": 128,
        "count": 1152,
        "packed": 1,
        "scale_format": "",
        "container": "int8",
        "plugin_namespace": "fp4export",
        "plugin_version": "1",
    }
    assert variant.attributes(layer="ff.net.2")["container"] == ""
