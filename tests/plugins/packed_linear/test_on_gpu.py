"""The kernels on a real GPU: every operator of the interpreter's tests, by all of its tactics. Skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from exporter.cuda.launcher import TORCH_TYPES, launcher_of
from plugins.kernels.hardware import HARDWARE
from plugins.packed_linear.descriptor import PackedLinear
from plugins.packed_linear.reference import packed_linear
from tests.plugins.packed_linear.cases import CASES, Arrays, Case, inputs_of, per_token
from tools.gpu_bench.cases import to_numpy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability(0) not in HARDWARE,
        reason="needs an NVIDIA GPU that kernels are made for, and there is none",
    ),
]

OPERATORS = {case.name: case for case in CASES}
MANY = 150
"""Tokens that no tile divides, and more than any holds."""


def least_db(variant: PackedLinear) -> float:
    """What rounding to the output's type leaves, and Hopper's sums of FP8 products, which have about 14 bits."""
    by_type = {"fp32": 100.0, "fp16": 60.0, "bf16": 45.0}[variant.float_type]
    return min(by_type, 55.0) if variant.container == "fp8" else by_type


def tensors_of(variant: PackedLinear, inputs: Arrays) -> list[Tensor]:
    """The operator's inputs on the GPU, in its order."""
    return [
        torch.from_numpy(inputs[name].view(np.uint8)).view(TORCH_TYPES[element]).view(inputs[name].shape).cuda()
        for name, element in variant.input_types.items()
    ]


def results(case: Case) -> Iterator[npt.NDArray[np.float64]]:
    """What each tactic makes of the case's inputs, on outputs that held NaN."""
    variant, launcher = case.variant, launcher_of(0)
    inputs = tensors_of(variant, inputs_of(case))
    for tactic in range(len(launcher.tactics(variant))):
        [y] = launcher.allocate(variant, inputs[0])
        launcher.launch(variant, tactic, inputs, [y.fill_(torch.nan)], torch.cuda.current_stream().cuda_stream)
        yield to_numpy(y).astype(np.float64)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_tactic_computes_what_the_reference_does(name: str) -> None:
    for case in (OPERATORS[name], replace(OPERATORS[name], rows=MANY)):
        expected = packed_linear(case.variant, per_token(case, inputs_of(case))).astype(np.float64)
        for found in results(case):
            error = np.square(found - expected).mean(axis=1) / np.square(expected).mean(axis=1)
            # Written so that a NaN counts as wrong.
            assert bool((error < 10 ** (-least_db(case.variant) / 10)).all()), 10 * np.log10(error.max())
