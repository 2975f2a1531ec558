"""The quantizers' kernels on a real GPU, as their tests in the interpreter. Skipped without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from exporter.cuda.launcher import TORCH_TYPES, run_on_gpu
from plugins.formats import get_format
from plugins.kernels.hardware import HARDWARE
from plugins.op import GeluQuantize, NormQuantize, TokenQuantize
from plugins.token_quantize.variant import QuantizerVariant
from tests.plugins.gelu_quantize import test_gelu_quantize as gelu
from tests.plugins.norm_quantize import test_norm_quantize as norm
from tests.plugins.token_quantize import test_token_quantize as token
from tests.plugins.token_quantize.rows import DTYPES, PAIRS, extreme_rows, turning_points

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability(0) not in HARDWARE,
        reason="needs an NVIDIA GPU that kernels are made for, and there is none",
    ),
]


def made(variant: QuantizerVariant, *inputs: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Numbers, as bytes, and scales."""

    def moved(array: npt.NDArray[Any], element: int) -> Tensor:
        octets = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8))
        return octets.view(TORCH_TYPES[element]).view(array.shape).cuda()

    tensors = [moved(array, element) for array, element in zip(inputs, variant.input_types.values(), strict=True)]
    numbers, scales = run_on_gpu(variant, tensors)
    return numbers.view(torch.int8).cpu().numpy(), scales.cpu().numpy()


@pytest.mark.parametrize(("fmt", "container"), PAIRS)
def test_tokens_are_rounded_as_the_format(fmt: str, container: str) -> None:
    x = turning_points(get_format(fmt))[None]
    variant = TokenQuantize(fmt, container, "fp32", x.shape[-1])
    token.check(*made(variant, x), x, variant)


@pytest.mark.parametrize("float_type", DTYPES)
@pytest.mark.parametrize(("fmt", "container"), gelu.VARIANTS)
def test_extreme_tokens(fmt: str, container: str, float_type: str) -> None:
    x = extreme_rows(1100, DTYPES[float_type])
    variant = TokenQuantize(fmt, container, float_type, 1100)
    token.check(*made(variant, x), x, variant)


@pytest.mark.parametrize("float_type", DTYPES)
@pytest.mark.parametrize(("fmt", "container"), gelu.VARIANTS)
def test_behind_gelu(fmt: str, container: str, float_type: str) -> None:
    x = extreme_rows(1100, DTYPES[float_type])
    variant = GeluQuantize(fmt, container, float_type, 1100)
    gelu.check(*made(variant, x), x, variant)


@pytest.mark.parametrize("float_type", DTYPES)
@pytest.mark.parametrize(("fmt", "container", "k", "shared"), norm.VARIANTS)
def test_behind_a_norm(fmt: str, container: str, k: int, shared: bool, float_type: str) -> None:
    given = [array.astype(DTYPES[float_type]) for array in norm.inputs(2, 2, k, 1 if shared else 2)]
    variant = NormQuantize(fmt, container, float_type, k, shared)
    norm.check(*made(variant, *given), given, variant)
