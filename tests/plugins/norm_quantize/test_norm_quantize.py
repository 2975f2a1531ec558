"""The quantizer behind a modulated norm: bit for bit where sums are exact, within their rounding elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto

from plugins.formats import get_format
from plugins.norm_quantize.reference import EPSILON, modulated_norm, norm_quantize
from plugins.op import NormQuantize, parse
from tests.plugins.token_quantize.rows import DTYPES, differing, run_body, run_kernel, same_bytes
from tests.plugins.triton_interpreter import TritonInterpreter

VARIANTS = [
    ("e2m3", "int8", 1152, False),
    ("e4m3", "fp8", 1000, True),
    ("e2m1", "fp16", 1408, True),
    ("int8", "int8", 77, False),
]


def inputs(batch: int, tokens: int, k: int, samples: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(seed)
    x = generator.standard_t(4, (batch, tokens, k)) + generator.uniform(-30, 30, (batch, tokens, 1))
    scale, shift = 1 + generator.normal(0, 0.3, (samples, 1, k)), generator.normal(0, 0.3, (samples, 1, k))
    return tuple(array.astype(np.float32) for array in (x, scale, shift))


def test_the_reference_is_a_modulated_norm() -> None:
    x, scale, shift = inputs(2, 3, 256, 2)
    norm = torch.nn.functional.layer_norm(torch.from_numpy(x).double(), (256,), eps=EPSILON).numpy()
    assert np.abs(modulated_norm(x, scale, shift) - (norm * scale + shift)).max() < 2e-5


def test_a_large_mean_costs_no_precision() -> None:
    x = np.tile(np.float32([[[4095.0, 4097.0]]]), (1, 1, 64)).astype(np.float32)
    ones, zeros = np.ones((1, 1, 128), np.float32), np.zeros((1, 1, 128), np.float32)
    assert np.abs(np.abs(modulated_norm(x, ones, zeros)) - 1).max() < 1e-6


def exact_inputs(shared: bool) -> tuple[tuple[np.ndarray, ...], NormQuantize]:
    """±1 around a whole mean: every sum is exact in any order, so every bit must be the reference's."""
    generator = np.random.default_rng(1)
    signs = generator.permuted(np.tile(np.float32([1, -1]), (2, 3, 64)), axis=-1)
    x = signs * np.float32([[[4], [8], [2]]]) + np.float32([[[1], [5], [-7]]])
    _, scale, shift = inputs(2, 3, 128, 1 if shared else 2)
    return (x, scale, shift), NormQuantize("e2m3", "int8", "fp32", 128, shared)


@pytest.mark.parametrize("shared", [False, True])
def test_the_kernel_where_sums_are_exact(interpreter: TritonInterpreter, shared: bool) -> None:
    given, variant = exact_inputs(shared)
    numbers, scales = run_kernel(interpreter, variant, *given)
    expected = norm_quantize(*given, get_format("e2m3"), "int8")
    assert same_bytes(scales, expected[1])
    assert same_bytes(numbers, expected[0])


def check(numbers: np.ndarray, scales: np.ndarray, given: list[np.ndarray], variant: NormQuantize) -> None:
    x, scale, shift = (array.astype(np.float32) for array in given)
    expected, expected_scales = norm_quantize(x, scale, shift, get_format(variant.format), variant.container)
    assert np.allclose(scales, expected_scales, rtol=1e-5, atol=0)
    wanted = modulated_norm(x, scale, shift) / expected_scales
    assert differing(numbers, expected, wanted, get_format(variant.format), 4e-6) == 0


@pytest.mark.parametrize("float_type", DTYPES)
@pytest.mark.parametrize(("fmt", "container", "k", "shared"), VARIANTS)
def test_kernel_and_body(
    interpreter: TritonInterpreter, fmt: str, container: str, k: int, shared: bool, float_type: str
) -> None:
    given = [array.astype(DTYPES[float_type]) for array in inputs(2, 2, k, 1 if shared else 2)]
    variant = NormQuantize(fmt, container, float_type, k, shared)
    for numbers, scales in (run_kernel(interpreter, variant, *given), run_body(variant, *given)):
        check(numbers, scales, given, variant)


def test_names_and_types() -> None:
    variant = NormQuantize("e2m3", "fp8", "fp16", 1152)
    assert variant.op_type == "NormQuantize_e2m3_fp8_fp16_k1152"
    assert parse(variant.op_type) == variant
    assert parse(f"{variant.op_type}_shared") == NormQuantize("e2m3", "fp8", "fp16", 1152, shared=True)
    assert variant.input_types == dict.fromkeys(("x", "scale", "shift"), TensorProto.FLOAT16)
    assert variant.kernels((9, 0))[0].scalars == ("rows", "rows_per_sample")
    assert NormQuantize("e2m3", "fp8", "fp16", 1152, shared=True).kernels((9, 0))[0].scalars == ("rows",)
