"""The block quantizers: their reference against the definition, and their function bodies bit for bit against it."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from plugins.block_quantize.reference import block_scales, expand_scales, quantize_blocks
from plugins.block_scales import BLOCK_SCALINGS, BlockScaling, factor_scales, scaling_with, tensor_scale_of
from plugins.float_dequantize.reference import dequantize_values
from plugins.formats import UnknownFormatError
from plugins.op import DequantizeValues, Gemm, QuantizeBlocks
from plugins.weight import GroupError
from tests.plugins.float_quantize.test_float_quantize import same_bits, tokens

Run = Callable[..., list[np.ndarray]]
NVFP4, MX = BLOCK_SCALINGS["nvfp4"], BLOCK_SCALINGS["mx"]


def operands(scaling: BlockScaling, x: np.ndarray, used: float = 1.0) -> tuple[np.ndarray, ...]:
    """x, and the tensor scale for a `used` share of its range where the scaling has one."""
    if not scaling.has_tensor_scale:
        return (x,)
    return (x, np.array(tensor_scale_of(float(np.abs(x).max()) * used, scaling), np.float32))


def quantized(scaling: BlockScaling, x: np.ndarray, used: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    scale = operands(scaling, x, used)[1:]
    return quantize_blocks(x, scaling, *(np.float32(s) for s in scale))


@pytest.mark.parametrize("scaling", BLOCK_SCALINGS.values(), ids=BLOCK_SCALINGS)
@pytest.mark.parametrize("used", [1.0, 0.1, 300.0])
def test_the_body_equals_the_reference(scaling: BlockScaling, used: float, run_variant: Run) -> None:
    """Also where scales saturate (a tenth of the range calibrated), and where many are subnormal or 0."""
    for x in (tokens(1, 3, 5, 96), tokens(2, 7, 64)):
        values, scales = run_variant(QuantizeBlocks(scaling), *operands(scaling, x, used))
        expected_values, expected_scales = quantized(scaling, x, used)
        assert same_bits(scales, expected_scales)
        assert same_bits(values, expected_values)


@pytest.mark.parametrize("scaling", BLOCK_SCALINGS.values(), ids=BLOCK_SCALINGS)
def test_scales_are_values_of_the_scale_format(scaling: BlockScaling) -> None:
    x = tokens(3, 40, 96)
    tensor_scale = operands(scaling, x)[1:] or (np.ones((), np.float32),)
    on_grid = quantized(scaling, x)[1] / tensor_scale[0]
    kind = {"e4m3": ml_dtypes.float8_e4m3fn, "e8m0": ml_dtypes.float8_e8m0fnu}[scaling.scale_format]
    assert np.array_equal(on_grid.astype(kind).astype(np.float32), on_grid)


def test_nvfp4_s_largest_group_gets_the_largest_scale() -> None:
    x = tokens(4, 6, 32)
    values, scales = quantized(NVFP4, x)
    tensor_scale = operands(NVFP4, x)[1]
    assert scales.max() == np.float32(448) * tensor_scale
    assert np.abs(dequantize_values(values, scales)).max() == pytest.approx(np.abs(x).max(), rel=1e-6)


def test_nvfp4_groups_far_below_the_tensor_s_range_become_zeros(run_variant: Run) -> None:
    x = np.full((1, 32), 3e-7, np.float32)
    x[0, :16] = 1.0
    values, scales = quantized(NVFP4, x)
    assert scales[0, 1] == 0
    assert not values[0, 16:].any()
    assert same_bits(run_variant(QuantizeBlocks(NVFP4), *operands(NVFP4, x))[0], values)
    assert not quantize_blocks(np.zeros((2, 16), np.float32), NVFP4, np.float32(1))[0].any()


def test_mx_scales_are_rounded_up_to_powers_of_two(run_variant: Run) -> None:
    """Every exponent, the power itself and its two neighbours: nothing saturates, and half the scale would."""
    powers = np.ldexp(np.float32(448), np.arange(-100, 118)).astype(np.float32)
    amax = np.concatenate([powers, np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))])
    scales = block_scales(amax, MX)
    assert np.array_equal(np.frexp(scales)[0], np.full(len(amax), 0.5))
    quotient = amax.astype(np.float64) / scales
    assert quotient.max() <= 448 * (1 + 2**-23)
    assert quotient.min() > 224 * (1 - 2**-23)
    assert block_scales(np.float32([448.0]), MX)[0] == 1.0
    x = np.repeat(amax[:, None], 32, axis=1)
    values, found = run_variant(QuantizeBlocks(MX), x)
    assert same_bits(found[:, 0], scales)
    assert same_bits(values, quantize_blocks(x, MX)[0])


@pytest.mark.parametrize("scaling", BLOCK_SCALINGS.values(), ids=BLOCK_SCALINGS)
def test_dequantizing_multiplies_group_by_group(scaling: BlockScaling, run_variant: Run) -> None:
    x = tokens(5, 2, 3, 64)
    values, scales = quantized(scaling, x)
    expected = values * expand_scales(scales, 64)
    [x_hat] = run_variant(DequantizeValues(scaling.group_size), values, scales)
    assert same_bits(x_hat, expected)
    assert same_bits(dequantize_values(values, scales), expected)
    kept = np.abs(x) > np.abs(x).max(axis=-1, keepdims=True) / 1000
    step = np.diff(scaling.values.magnitudes).max()
    assert (np.abs(x_hat - x) <= 0.6 * step * expand_scales(scales, 64))[kept].all()


def test_scales_are_factored_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(1, 127, (8, 4)).astype(np.uint8)
    for tensor_scale in np.float32([2.0**-9, 12345 / 2.0**20, 1.0]):
        scales = NVFP4.scales.decode(codes) * tensor_scale
        factors = factor_scales(scales, NVFP4)
        assert factors is not None
        assert same_bits(NVFP4.scales.decode(factors[1]) * factors[0], scales)
    assert factor_scales(rng.uniform(1, 2, (8, 4)).astype(np.float32), NVFP4) is None
    assert factor_scales(np.zeros((2, 2), np.float32), NVFP4) is None
    powers = np.ldexp(np.float32(1), rng.integers(-20, 20, (8, 4))).astype(np.float32)
    factors = factor_scales(powers, MX)
    assert factors is not None
    assert (factors[0], int(factors[1][0, 0])) == (1.0, int(np.log2(powers[0, 0])) + 127)
    assert factor_scales(powers * np.float32(3), MX) is None


def test_names_are_read_back_and_others_refused() -> None:
    for scaling in BLOCK_SCALINGS.values():
        assert QuantizeBlocks.parse(QuantizeBlocks(scaling).op_type) == QuantizeBlocks(scaling)
        fmt, size = scaling.value_format, scaling.group_size
        gemm = Gemm(fmt, fmt, size, 64, has_multipliers=False, packed=True, has_bias=True, scaling=scaling)
        assert Gemm.parse(gemm.op_type) == gemm
        assert DequantizeValues.parse(f"FloatDequantize_values_g{size}") == DequantizeValues(size)
    assert QuantizeBlocks(NVFP4).op_type == "FloatQuantizeBlocks_e2m1_g16_e4m3"
    assert QuantizeBlocks.parse("FloatQuantizeOnline_e2m1") is None
    assert scaling_with("e2m1", 32, "e4m3") is None
    with pytest.raises(UnknownFormatError, match="valid: FloatQuantizeBlocks_e2m1_g16_e4m3"):
        QuantizeBlocks.parse("FloatQuantizeBlocks_e2m1_g32_e4m3")
    with pytest.raises(GroupError, match="groups of 16 do not divide 24"):
        quantize_blocks(np.ones((2, 24), np.float32), NVFP4, np.float32(1))
    with pytest.raises(GroupError, match="nvfp4 has groups of 16, not 32"):
        Gemm("e2m1", "e2m1", 32, 64, has_multipliers=False, packed=False, has_bias=False, scaling=NVFP4)
    with pytest.raises(UnknownFormatError, match="nvfp4 scales both operands in e2m1"):
        Gemm("e2m1", "e2m3", 16, 64, has_multipliers=False, packed=False, has_bias=False, scaling=NVFP4)
