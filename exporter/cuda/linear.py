"""A quantized linear as its kernels compute it: a quantizer and a product with packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporter.container_choice import kernel_container
from exporter.cuda.launcher import run_on_gpu
from exporter.layer_section import HIGH_PRECISION, Scales
from exporter.packed_weights import CodedWeight, pack_weight
from exporter.passes.fold import fold_rows
from exporter.presets import LayerScheme
from plugins.containers import INT8, multipliers
from plugins.formats import get_format
from plugins.kernels.hardware import HARDWARE, Capability
from plugins.packed_linear.descriptor import WEIGHT_ONLY, PackedLinear
from plugins.tensorrt_plugins.variant import PluginVariant
from plugins.token_quantize.descriptor import TokenQuantize

if TYPE_CHECKING:
    from exporter.quantize import QuantLinear

FLOAT_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
)
"""Types of x and y, as operators name them."""

Run = Callable[[PluginVariant, Sequence[Tensor]], tuple[Tensor, ...]]
"""Computes an operator's outputs from its inputs."""


@dataclass(frozen=True)
class KernelLinear:
    """Operators, for floats of FP32, and packed tensors on one device; `quantizer` is None for weights alone."""

    quantizer: TokenQuantize | None
    product: PackedLinear
    words: Tensor
    weight_scales: Tensor
    multipliers: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, layer: QuantLinear, capability: Capability, device: torch.device) -> KernelLinear | None:
        """The layer packed for GPUs of a compute capability; None where there is no kernel for it."""
        hardware = HARDWARE.get(capability)
        if hardware is None:
            return None
        quantized = layer.activation_format != HIGH_PRECISION
        weight = _coded_weight(layer)
        scales: Scales = "channel" if not weight.group_size else "group" if weight.multipliers is None else "foldable"
        scheme = LayerScheme(
            layer.weight_format, weight.group_size, scales, layer.activation_format, layer.asked_container
        )
        container = None if layer.scaling else kernel_container(scheme, layer.in_features, has_fp8=hardware.has_fp8)
        if container is None:
            return None
        packed = pack_weight(
            layer.layer,
            weight,
            container if quantized else WEIGHT_ONLY,
            layer.activation_format if quantized else None,
            has_bias=layer.bias is not None,
        )
        factors = None if packed.multipliers is None else torch.from_numpy(packed.multipliers).to(device)
        return cls(
            TokenQuantize(layer.activation_format, container, "fp32", layer.in_features) if quantized else None,
            packed.variant,
            torch.from_numpy(packed.words).to(device),
            torch.from_numpy(packed.weight_scales).to(device),
            factors,
            None if layer.bias is None else layer.bias.detach().to(device, torch.float32),
        )

    def takes(self, x: Tensor) -> bool:
        """Whether there are kernels for x's type: weights alone are multiplied in 16 bits only."""
        return x.dtype in FLOAT_NAMES and (self.quantizer is not None or x.dtype != torch.float32)

    def operators(self, x: Tensor) -> tuple[TokenQuantize | None, PackedLinear]:
        """The quantizer and the product for floats of x's type."""
        name = FLOAT_NAMES[x.dtype]
        quantizer = None if self.quantizer is None else replace(self.quantizer, float_type=name)
        return quantizer, replace(self.product, float_type=name)

    def operands(self, x: Tensor, run: Run) -> list[Tensor]:
        """The product's inputs for x, which is contiguous, its numbers and scales made by `run`."""
        quantizer, product = self.operators(x)
        made = {"x": x} if quantizer is None else dict(zip(("numbers", "x_scales"), run(quantizer, [x]), strict=True))
        constants = {
            "words": self.words,
            "weight_scales": self.weight_scales,
            "multipliers": self.multipliers,
            "bias": self.bias,
        }
        tensors = {**made, **{name: tensor for name, tensor in constants.items() if tensor is not None}}
        return [tensors[name] for name in product.input_names]

    def multiply(self, x: Tensor, run: Run) -> Tensor:
        """x [..., K] → y [..., N] of x's type."""
        [y] = run(self.operators(x)[1], self.operands(x.contiguous(), run))
        return y


class PackedOnGpu:
    """A layer as it was packed for the GPU of its last input, or the knowledge that there is no kernel for it.

    The packed weight is all that the GPU then keeps of it but for scales and bias: the layer's words move to the host.
    """

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._kernels: KernelLinear | None = None

    def multiply(self, layer: QuantLinear, x: Tensor) -> Tensor | None:
        """y by the kernels on x's GPU; None where the reference computes it: on a CPU, without a kernel for the layer
        or x's type, where a gradient is asked for, and in what torch.compile traces.
        """
        if not x.is_cuda or torch.compiler.is_compiling():
            return None
        kernels = self.kernels(layer, x)
        return None if kernels is None else kernels.multiply(x, run_on_gpu)

    def kernels(self, layer: QuantLinear, x: Tensor) -> KernelLinear | None:
        """What multiplies x on its device, None where there is nothing or a gradient is asked for."""
        if torch.is_grad_enabled() and x.requires_grad:
            return None
        if self._device != x.device:
            self._kernels = KernelLinear.of(layer, torch.cuda.get_device_capability(x.device), x.device)
            self._device = x.device
            if self._kernels is not None:
                layer.words = layer.words.cpu()
        return self._kernels if self._kernels is not None and self._kernels.takes(x) else None


def _coded_weight(layer: QuantLinear) -> CodedWeight:
    codes, scales = layer.codes.cpu().numpy(), layer.scales.detach().cpu().numpy()
    if scales.shape[1] == 1:
        return CodedWeight(layer.weight_format, codes, scales, None, 0)
    folded = fold_rows(scales, multipliers(get_format(layer.weight_format), INT8))
    channel, factors = (scales, None) if folded is None else folded
    return CodedWeight(layer.weight_format, codes, channel, factors, layer.group_size)
