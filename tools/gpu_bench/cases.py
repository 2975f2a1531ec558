"""The operators that are timed: their shapes, random inputs, and the check of what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exporter.calibration.scales import choose_scales
from exporter.cuda.linear import KernelLinear
from exporter.plan import LayerPlan
from exporter.quantize import QuantLinear, round_to_nearest
from plugins.containers import INT8, multipliers
from plugins.formats import get_format
from plugins.kernels.hardware import Capability
from plugins.packed_linear.descriptor import PackedLinear
from plugins.packed_linear.reference import packed_linear
from plugins.token_quantize.descriptor import TokenQuantize
from plugins.token_quantize.reference import quantize_tokens

FLOATS = torch.bfloat16
PIXART = ((1152, 1152), (4608, 1152), (1152, 4608))
HUNYUAN = ((1408, 1408), (6144, 1408), (1408, 6144), (1408, 2816))
SHAPES = (*PIXART, *HUNYUAN)
"""[N, K] of the blocks' linears."""

MANY, FEW = (2048, 8192), (16,)
"""Tokens."""

SCHEMES = {"W4A6 (E2M1 × E2M3)": "e2m3", "W4A8 (E2M1 × E4M3)": "e4m3"}
"""Activation formats; weights are in groups of 128 with foldable scales, as the recipes have them."""

_CHECKED_ROWS = 64
_LEAST_DB = 45.0
"""Rounding to BF16 alone leaves 50 dB or so."""


class WrongResultError(RuntimeError):
    """A kernel that does not compute what its reference does."""


@dataclass(frozen=True)
class Case:
    """A quantized linear layer with random weights, packed for a GPU, and random tokens."""

    scheme: str
    rows: int
    n: int
    k: int
    weight: Tensor
    x: Tensor
    kernels: KernelLinear

    @classmethod
    def random(
        cls, scheme: str, rows: int, n: int, k: int, *, capability: Capability, device: torch.device, seed: int = 0
    ) -> Case:
        """Normal weights, and tokens whose sizes differ by orders. Raises `ValueError` where there is no kernel."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(n, k, generator=generator) / k**0.5
        spread = torch.exp(2 * torch.randn(rows, 1, generator=generator))
        x = (torch.randn(rows, k, generator=generator) * spread).to(FLOATS)
        fmt = get_format("e2m1")
        plan = LayerPlan("layer", n, k, True, "e2m1", SCHEMES[scheme], 128, "foldable", "int8")
        scales = choose_scales(weight, fmt, plan.group_size, "absmax", None, multipliers(fmt, INT8))
        layer = QuantLinear(plan, round_to_nearest(weight, scales, fmt), torch.randn(n, generator=generator))
        kernels = KernelLinear.of(layer, capability, device)
        if kernels is None:
            raise ValueError(f"no kernel of {scheme} for compute capability {capability}")
        return cls(scheme, rows, n, k, weight.to(device, FLOATS), x.to(device), kernels)

    def check(self, operands: Sequence[Tensor], y: Tensor) -> float:
        """The result's SNR in decibels over the reference's, on some of the rows.

        Raises `WrongResultError` if a number or a scale is not bitwise the reference's, or the product is off.
        """
        quantizer, product = self._operators
        numbers, scales, expected_y = self._expected
        made = [to_numpy(tensor)[self._checked] for tensor in operands[:2]]
        for name, expected, found in zip(("numbers", "scales"), (numbers, scales), made, strict=True):
            if expected.tobytes() != found.tobytes():
                raise WrongResultError(f"{quantizer.op_type}: {name} are not the reference's")
        error = np.square(expected_y - to_numpy(y)[self._checked].astype(np.float64)).mean(axis=1)
        decibels = -10 * np.log10(np.maximum(error / np.square(expected_y).mean(axis=1), 1e-12))
        # A NaN compares false, and is wrong.
        if not decibels.min() >= _LEAST_DB:
            raise WrongResultError(f"{product.op_type}: a token at {decibels.min():.1f} dB, less than {_LEAST_DB:.0f}")
        return float(decibels.min())

    @property
    def _operators(self) -> tuple[TokenQuantize, PackedLinear]:
        quantizer, product = self.kernels.operators(self.x)
        if quantizer is None:
            raise ValueError(f"{self.scheme} quantizes no activations")
        return quantizer, product

    @property
    def _checked(self) -> npt.NDArray[np.int64]:
        return np.unique(np.linspace(0, self.rows - 1, _CHECKED_ROWS).astype(np.int64))

    @cached_property
    def _expected(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.float64]]:
        """The checked rows' numbers, scales and results: once for all tactics."""
        quantizer, product = self._operators
        x = to_numpy(self.x)[self._checked].astype(np.float32)
        numbers, scales = quantize_tokens(x, quantizer.number_format, quantizer.container)
        kernels = self.kernels
        packed = (kernels.words, kernels.weight_scales, kernels.multipliers, kernels.bias)
        constants = [to_numpy(tensor) for tensor in packed if tensor is not None]
        inputs = dict(zip(product.input_names, [numbers, scales, *constants], strict=True))
        return numbers, scales, packed_linear(product, inputs).astype(np.float64)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The tensor on the host, in numpy's or ml_dtypes' own type."""
    narrow = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}
    host = tensor.detach().cpu().contiguous()
    if host.dtype not in narrow:
        return np.asarray(host.numpy())
    return np.asarray(host.view(torch.uint8).numpy().view(narrow[host.dtype]).reshape(host.shape))
