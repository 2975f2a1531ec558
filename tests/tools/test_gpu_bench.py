"""What can be tested of the GPU's benchmark without one: its cases, its check and its page."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from plugins.op import parse
from plugins.packed_linear.descriptor import PackedLinear
from plugins.packed_linear.reference import packed_linear
from plugins.tensorrt_plugins.variant import PluginVariant
from plugins.token_quantize.descriptor import TokenQuantize
from plugins.token_quantize.reference import quantize_tokens
from tools.bench_gpu import PAGE, SANITIZERS, SECTION, main, sanitizer_commands
from tools.gpu_bench.cases import SCHEMES, Case, WrongResultError, to_numpy
from tools.gpu_bench.page import (
    LinearRow,
    QuantizerRow,
    Results,
    StepRow,
    section,
)
from tools.marked_section import marked_sections, markers

CPU = torch.device("cpu")
ROW = LinearRow("W4A6", 2048, 1152, 1152, "int8", 1, 0, 0.012, 0.010, 0.012, 0.018, {"FP8": 0.0095, "INT8": 0.009})
QUANTIZER = QuantizerRow("e2m3", 2048, 1152, ("t0", "t1"), 0.004, 0.7, 0.006, 0.0055)
STEPS = (StepRow("BF16 eager", 20.0, 24.0, 1.2, 1.5, None), StepRow("W4A6, our kernels", 10.0, 15.0, 0.4, 0.7, 21.5))
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run_references(variant: PluginVariant, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """BF16 tokens' numbers and scales."""
    assert isinstance(variant, TokenQuantize)
    numbers, scales = quantize_tokens(to_numpy(inputs[0]).astype("float32"), variant.number_format, variant.container)
    kind = torch.float8_e4m3fn if variant.container == "fp8" else torch.int8
    return torch.from_numpy(numbers.view("int8")).view(kind), torch.from_numpy(scales)


def reference_product(case: Case, operands: Sequence[Tensor]) -> Tensor:
    product = case.kernels.operators(case.x)[1]
    inputs = dict(zip(product.input_names, map(to_numpy, operands), strict=True))
    return torch.from_numpy(packed_linear(product, inputs).view("int16")).view(torch.bfloat16)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_check_takes_the_reference_and_nothing_else(scheme: str) -> None:
    case = Case.random(scheme, 37, 136, 256, capability=(9, 0), device=CPU)
    operands = case.kernels.operands(case.x, run_references)
    y = reference_product(case, operands)
    assert case.check(operands, y) > 100
    with pytest.raises(WrongResultError, match="a token at"):
        case.check(operands, y * 1.02)
    with pytest.raises(WrongResultError, match="a token at"):
        case.check(operands, torch.full_like(y, torch.nan))
    wrong = operands[1].clone()
    wrong[5] *= 1 + 2**-20
    with pytest.raises(WrongResultError, match="scales are not"):
        case.check([operands[0], wrong, *operands[2:]], y)


def test_the_cases_operators_are_those_that_tensorrt_gets() -> None:
    case = Case.random("W4A6 (E2M1 × E2M3)", 2, 1152, 1152, capability=(8, 7), device=CPU)
    quantizer, product = case.kernels.operators(case.x)
    assert isinstance(product, PackedLinear)
    assert product.op_type == "PackedLinear_e2m1_int8_bf16_n1152_k1152_g128m_bias"
    assert quantizer is not None
    assert parse(quantizer.op_type) == quantizer


def test_aims_are_met_missed_or_not_run() -> None:
    text = section(Results("command", "GPU", 50, 0.003, [ROW], [QUANTIZER], STEPS))
    assert "| GEMM at least 1.6 × BF16 | 1.80 (median 1.80, 1 shapes) | met |" in text
    assert "| GEMM at least 0.85 × the better 8-bit library GEMM | 0.90 (median 0.90, 1 shapes) | met |" in text
    assert "copy bandwidth | 0.70 (median 0.70, 1 shapes) | **missed** |" in text
    assert "LayerNorm alone | 1.09 (median 1.09, 1 shapes) | met |" in text
    assert "| up to 16 tokens, GEMM at least 2.5 × BF16 | – | not run |" in text
    assert "| W4A6, our kernels | 10.00 ms | 2.00 | 15.00 ms | 0.40 GB | 0.70 GB | 21.5 dB |" in text
    assert "t1 | t0: 0.0120" in text


def test_an_aim_is_as_good_as_its_worst_shape() -> None:
    slow = LinearRow("W4A6", 8192, 1152, 1152, "int8", 0, 0, 0.02, 0.02, 0.03, 0.018, {}, {"FP8": "sm_87 has none"})
    text = section(Results("command", "GPU", 50, 0.003, [ROW, slow]))
    assert "| GEMM at least 1.6 × BF16 | 0.90 (median 1.35, 2 shapes) | **missed** |" in text
    assert "Not run: library FP8: sm_87 has none." in text


def test_the_page_has_a_section_for_the_gpu() -> None:
    sections = marked_sections(PAGE)
    assert sum(section.startswith(markers(SECTION)[0]) for section in sections) == 1


@NO_GPU
def test_without_a_gpu_one_line_says_so() -> None:
    result = CliRunner().invoke(main, ["--check"])
    assert result.exit_code == 3
    assert result.output == ("error: no GPU that this PyTorch can use; run this on a machine with an NVIDIA GPU\n")


def test_sanitizing_runs_the_check_under_every_tool() -> None:
    commands = sanitizer_commands()
    assert [command[2] for command in commands] == list(SANITIZERS)
    assert all(command[0] == "compute-sanitizer" and command[-1] == "--check" for command in commands)
