"""The token quantizer: its kernel in Triton's interpreter and its function body, bit for bit the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from plugins.formats import UnknownFormatError, get_format
from plugins.kernels.hardware import HARDWARE
from plugins.op import TokenQuantize, parse
from plugins.token_quantize.reference import ContainerError, container_numbers, number_factor, quantize_tokens
from plugins.token_quantize.variant import MAX_K, RowLengthError
from tests.plugins.token_quantize.rows import (
    DTYPES,
    PAIRS,
    extreme_rows,
    run_body,
    run_kernel,
    same_bytes,
    turning_points,
)
from tests.plugins.triton_interpreter import TritonInterpreter


def check(numbers: np.ndarray, scales: np.ndarray, x: np.ndarray, variant: TokenQuantize) -> None:
    expected = quantize_tokens(x.astype(np.float32), get_format(variant.format), variant.container)
    assert same_bytes(numbers, expected[0])
    assert same_bytes(scales, expected[1])


@pytest.mark.parametrize(("fmt", "container"), PAIRS)
def test_the_kernel_rounds_as_the_format(interpreter: TritonInterpreter, fmt: str, container: str) -> None:
    x = turning_points(get_format(fmt))[None]
    variant = TokenQuantize(fmt, container, "fp32", x.shape[-1])
    numbers, scales = run_kernel(interpreter, variant, x)
    assert scales == 1
    check(numbers, scales, x, variant)


@pytest.mark.parametrize("float_type", DTYPES)
@pytest.mark.parametrize(("fmt", "container"), [("e2m3", "int8"), ("e4m3", "fp8"), ("e2m1", "fp16"), ("int8", "int8")])
def test_the_kernel_on_extreme_rows(interpreter: TritonInterpreter, fmt: str, container: str, float_type: str) -> None:
    x = extreme_rows(100, DTYPES[float_type])
    variant = TokenQuantize(fmt, container, float_type, 100)
    check(*run_kernel(interpreter, variant, x), x, variant)


@pytest.mark.parametrize("k", [1, 7, 64, 1000, 1024, 1152, 1408, 2048, 4608, 5632])
def test_the_kernel_for_rows_of_every_length(interpreter: TritonInterpreter, k: int) -> None:
    x = extreme_rows(k, DTYPES["bf16"])[3:]
    variant = TokenQuantize("e2m3", "fp8", "bf16", k)
    check(*run_kernel(interpreter, variant, x), x, variant)


def test_the_kernel_takes_any_leading_dimensions(interpreter: TritonInterpreter) -> None:
    x = extreme_rows(36, DTYPES["fp16"]).reshape(5, 1, 2, 18)
    variant = TokenQuantize("e2m3", "int8", "fp16", 18)
    check(*run_kernel(interpreter, variant, x), x, variant)


def test_a_row_with_a_nan_has_no_finite_scale_and_others_are_not_touched(interpreter: TritonInterpreter) -> None:
    x = extreme_rows(100, DTYPES["fp32"])
    broken = x.copy()
    broken[2, 70], broken[3, 5], broken[3, 6] = np.nan, np.inf, -1
    numbers, scales = run_kernel(interpreter, TokenQuantize("e2m3", "int8", "fp32", 100), broken)
    assert np.isnan(scales[2, 0])
    assert np.isposinf(scales[3, 0])
    kept = [0, 1, 4]
    check(numbers[kept], scales[kept], x[kept], TokenQuantize("e2m3", "int8", "fp32", 100))


@pytest.mark.parametrize(
    ("fmt", "container", "float_type"),
    [*((*pair, "fp32") for pair in PAIRS), ("e2m3", "fp8", "fp16"), ("e4m3", "fp16", "bf16")],
)
def test_the_function_body(fmt: str, container: str, float_type: str) -> None:
    x = extreme_rows(64, DTYPES[float_type])
    variant = TokenQuantize(fmt, container, float_type, 64)
    check(*run_body(variant, x), x, variant)


@pytest.mark.parametrize(("fmt", "container"), PAIRS)
def test_the_function_body_rounds_as_the_format(fmt: str, container: str) -> None:
    x = turning_points(get_format(fmt))[None]
    variant = TokenQuantize(fmt, container, "fp32", x.shape[-1])
    check(*run_body(variant, x), x, variant)


@pytest.mark.parametrize(("fmt", "container"), PAIRS)
def test_numbers_are_values_times_a_power_of_two(fmt: str, container: str) -> None:
    table = get_format(fmt)
    values = table.values[table.valid] + np.float32(0)
    numbers = container_numbers(values, table, container)
    if container == "fp16":
        numbers = numbers.view(container_numbers(values, table, "fp8").dtype)
    assert np.array_equal(numbers.astype(np.float64), values.astype(np.float64) * number_factor(table, container))
    assert np.frexp(number_factor(table, container))[0] == 0.5


def test_names_and_types() -> None:
    variant = TokenQuantize("e2m3", "fp16", "bf16", 1152)
    assert variant.op_type == "TokenQuantize_e2m3_fp16_bf16_k1152"
    assert parse(variant.op_type) == variant
    assert variant.input_types == {"x": TensorProto.BFLOAT16}
    assert variant.output_types == {"numbers": TensorProto.INT8, "scales": TensorProto.FLOAT}
    assert variant.output_widths == (1152, 1)
    assert TokenQuantize("e2m3", "fp8", "fp16", 8).output_types["numbers"] == TensorProto.FLOAT8E4M3FN
    for name in ("TokenQuantize_e2m3_fp16_bf16_k1152_shared", "TokenQuantize_e2m3_fp16_bf16_k01", "TokenQuantize_e2m3"):
        assert TokenQuantize.parse(name) is None


def test_every_tactic_has_a_name_of_its_own() -> None:
    variant = TokenQuantize("e2m3", "int8", "fp16", 1152)
    specs = [spec for capability in HARDWARE for spec in variant.kernels(capability)]
    assert len({spec.name for spec in specs}) == len(specs) == 3 * len(HARDWARE)
    assert [spec.launch.num_warps for spec in variant.kernels((9, 0))] == [4, 2, 1]
    assert [spec.launch.num_warps for spec in TokenQuantize("int8", "int8", "fp16", 64).kernels((9, 0))] == [1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("e2m4", "int8", "fp16", 64), UnknownFormatError, "unknown format 'e2m4'; did you mean 'e2m3'"),
        (("e3m0", "int8", "fp16", 64), UnknownFormatError, "'e3m0' is no activation format; valid: e2m1"),
        (("e4m3", "int8", "fp16", 64), ContainerError, "int8 does not hold the values of e4m3; nearest that does: fp8"),
        (("e5m2", "fp8", "fp16", 64), ContainerError, "fp8 does not hold the values of e5m2; nearest that does: none"),
        (("ue2m4", "int8", "fp16", 64), ContainerError, "ue2m4 has no sign, .* nearest: e2m3"),
        (("e2m3", "fp4", "fp16", 64), ContainerError, "'fp4' is no container of activations; valid: int8, fp8, fp16"),
        (("e2m3", "int8", "fp15", 64), UnknownFormatError, "unknown float type 'fp15'; did you mean 'fp16'"),
        (("e2m3", "int8", "fp16", 0), RowLengthError, "tokens of 1 to 16384 numbers, not 0"),
        (("e2m3", "int8", "fp16", MAX_K + 1), RowLengthError, "tokens of 1 to 16384 numbers, not 16385"),
    ],
)
def test_bad_variants_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TokenQuantize(*arguments)


def test_fp8_has_no_kernels_without_e4m3() -> None:
    variant = TokenQuantize("e2m3", "fp8", "fp16", 64)
    with pytest.raises(ContainerError, match=r"compute capability 8\.7 has no fp8; nearest container: fp16"):
        variant.kernels((8, 7))
    assert variant.kernels((8, 9))[0].constants["CONVERTS"]
    assert not TokenQuantize("e2m3", "fp16", "fp16", 64).kernels((8, 7))[0].constants["CONVERTS"]


def test_bodies_name_every_attribute() -> None:
    variant = TokenQuantize("e2m3", "int8", "fp16", 64)
    function = variant.function()
    assert list(function.attribute) == list(variant.attributes("layer"))
    assert isinstance(function, onnx.FunctionProto)
