"""The quantizer behind GELU: its kernel and its body do what the reference does, but for roundings of 2^x itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plugins.formats import get_format
from plugins.gelu_quantize.reference import gelu_quantize, tanh_gelu
from plugins.op import GeluQuantize, parse
from tests.plugins.token_quantize.rows import DTYPES, differing, extreme_rows, run_body, run_kernel
from tests.plugins.triton_interpreter import TritonInterpreter

VARIANTS = [("e2m3", "int8"), ("e4m3", "fp8"), ("e2m1", "fp16"), ("int8", "int8")]


def test_the_reference_is_tanh_gelu() -> None:
    x = np.linspace(-6, 12, 100_001, dtype=np.float32)
    wide = x.astype(np.float64)
    exact = wide / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    assert (np.abs(tanh_gelu(x) - exact) <= 5e-6 * np.abs(exact)).all()
    theirs = torch.nn.functional.gelu(torch.from_numpy(x), approximate="tanh").numpy()
    assert np.abs(tanh_gelu(x) - theirs).max() <= 1e-6


def test_the_reference_at_the_ends() -> None:
    x = np.array([3e38, -3e38, 1e20, -1e20, 0.0, 30.0, -30.0], np.float32)
    assert tanh_gelu(x).tolist() == [x[0], 0, x[2], 0, 0, 30, 0]


def check(numbers: np.ndarray, scales: np.ndarray, x: np.ndarray, variant: GeluQuantize) -> None:
    """What `extreme_rows` become; rows of tiny numbers and of one large one have too few quotients that are certain."""
    expected, expected_scales = gelu_quantize(x.astype(np.float32), get_format(variant.format), variant.container)
    assert np.allclose(scales, expected_scales, rtol=1e-6, atol=0)
    wanted = tanh_gelu(x.astype(np.float32)) / expected_scales
    assert differing(numbers[3:], expected[3:], wanted[3:], get_format(variant.format)) == 0
    assert not numbers[0].view(np.int8).any()
    assert np.count_nonzero(expected[-1].view(np.int8)) > 100


@pytest.mark.parametrize("float_type", DTYPES)
@pytest.mark.parametrize(("fmt", "container"), VARIANTS)
def test_kernel_and_body(interpreter: TritonInterpreter, fmt: str, container: str, float_type: str) -> None:
    x = extreme_rows(1100, DTYPES[float_type])
    variant = GeluQuantize(fmt, container, float_type, 1100)
    for numbers, scales in (run_kernel(interpreter, variant, x), run_body(variant, x)):
        check(numbers, scales, x, variant)


def test_names() -> None:
    variant = GeluQuantize("e2m3", "int8", "fp16", 4608)
    assert variant.op_type == "GeluQuantize_e2m3_int8_fp16_k4608"
    assert parse(variant.op_type) == variant
    assert variant.input_names == ("x",)
