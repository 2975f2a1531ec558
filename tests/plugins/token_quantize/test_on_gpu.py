"""The quantizers' kernels on a real GPU, as their tests in the interpreter. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from exporter.cuda.launcher import TORCH_TYPES, launcher_of
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


def results(
    variant: QuantizerVariant, *inputs: npt.NDArray[Any]
) -> Iterator[tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]]:
    """Numbers, as bytes, and scales of every tactic, on outputs that held something else."""

    def moved(array: npt.NDArray[Any], element: int) -> Tensor:
        octets = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8))
        return octets.view(TORCH_TYPES[element]).view(array.shape).cuda()

    launcher = launcher_of(0)
    tensors = [moved(array, element) for array, element in zip(inputs, variant.input_types.values(), strict=True)]
    for tactic in range(len(launcher.tactics(variant))):
        numbers, scales = launcher.allocate(variant, tensors[0])
        octets = numbers.view(torch.int8).fill_(0x55)
        launcher.launch(variant, tactic, tensors, [numbers, scales.fill_(-1)], torch.cuda.current_stream().cuda_stream)
        yield octets.cpu().numpy(), scales.cpu().numpy()


@pytest.mark.parametrize(("fmt", "container"), PAIRS)
def test_tokens_are_rounded_as_the_format(fmt: str, container: str) -> None:
    x = turning_points(get_format(fmt))[None]
    variant = TokenQuantize(fmt, container, "fp32", x.shape[-1])
    for numbers, scales in results(variant, x):
        token.check(numbers, scales, x, variant)


@pytest.mark.parametrize(
    ("quantizer", "check"), [(TokenQuantize, token.check), (GeluQuantize, gelu.check)], ids=["alone", "behind GELU"]
)
@pytest.mark.parametrize("float_type", DTYPES)
@pytest.mark.parametrize(("fmt", "container"), gelu.VARIANTS)
def test_extreme_tokens(
    quantizer: type[QuantizerVariant], check: Callable[..., None], fmt: str, container: str, float_type: str
) -> None:
    x = extreme_rows(1100, DTYPES[float_type])
    variant = quantizer(fmt, container, float_type, 1100)
    for numbers, scales in results(variant, x):
        check(numbers, scales, x, variant)


@pytest.mark.parametrize("float_type", DTYPES)
@pytest.mark.parametrize(("fmt", "container", "k", "shared"), norm.VARIANTS)
def test_behind_a_norm(fmt: str, container: str, k: int, shared: bool, float_type: str) -> None:
    given = [array.astype(DTYPES[float_type]) for array in norm.inputs(2, 2, k, 1 if shared else 2)]
    variant = NormQuantize(fmt, container, float_type, k, shared)
    for numbers, scales in results(variant, *given):
        norm.check(numbers, scales, given, variant)


@pytest.mark.parametrize("shared", [False, True])
def test_behind_a_norm_whose_sums_are_exact(shared: bool) -> None:
    given, variant = norm.exact_inputs(shared)
    expected = norm.norm_quantize(*given, get_format(variant.format), variant.container)
    for found in results(variant, *given):
        assert all(norm.same_bytes(one, other) for one, other in zip(found, expected, strict=True))
