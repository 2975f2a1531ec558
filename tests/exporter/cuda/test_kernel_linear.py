"""The operators of a quantized linear compute what the layer's reference does: here by the operators' own references,
on a GPU by their kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from exporter.calibration.scales import choose_scales
from exporter.cuda.launcher import TORCH_TYPES
from exporter.cuda.linear import KernelLinear, PackedOnGpu
from exporter.plan import LayerPlan
from exporter.quantize import QuantLinear, round_to_nearest
from plugins.containers import INT8, multipliers
from plugins.formats import get_format
from plugins.kernels.hardware import Capability
from plugins.packed_linear.descriptor import PackedLinear
from plugins.packed_linear.reference import packed_linear
from plugins.tensorrt_plugins.variant import PluginVariant
from plugins.token_quantize.descriptor import TokenQuantize
from plugins.token_quantize.reference import quantize_tokens

N, K = 40, 256
HOPPER, ORIN = (9, 0), (8, 7)
CPU = torch.device("cpu")

W4A6 = LayerPlan("layer", N, K, True, "e2m1", "e2m3", 128, "foldable", "int8")
W4A8 = replace(W4A6, activation_format="e4m3")
FREE_GROUPS = replace(W4A6, scales="group", weight_format="e1m2")
CHANNELS = replace(W4A6, group_size=0, scales="channel", has_bias=False)
SIX_BITS = replace(CHANNELS, weight_format="e2m3", activation_format="e4m3")
WEIGHTS = replace(W4A6, activation_format="none")


def layer_of(plan: LayerPlan) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    weight, fmt = torch.randn(N, K, generator=generator), get_format(plan.weight_format)
    allowed = multipliers(fmt, INT8) if plan.scales == "foldable" else ()
    scales = choose_scales(weight, fmt, plan.group_size, "absmax", None, allowed)
    bias = torch.randn(N, generator=generator) if plan.has_bias else None
    return QuantLinear(plan, round_to_nearest(weight, scales, fmt), bias)


def run_references(variant: PluginVariant, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The operator's outputs in numpy, from tensors of exactly the types that it takes."""
    types = [TORCH_TYPES[element] for element in variant.input_types.values()]
    assert [tensor.dtype for tensor in inputs] == types
    arrays = [to_numpy(tensor) for tensor in inputs]
    if isinstance(variant, TokenQuantize):
        outputs: tuple[npt.NDArray[Any], ...] = quantize_tokens(
            arrays[0].astype(np.float32), variant.number_format, variant.container
        )
    else:
        assert isinstance(variant, PackedLinear)
        outputs = (packed_linear(variant, dict(zip(variant.input_names, arrays, strict=True))),)
    elements = variant.output_types.values()
    return tuple(
        torch.from_numpy(array.view(np.uint8)).view(TORCH_TYPES[element]).view(array.shape)
        for array, element in zip(outputs, elements, strict=True)
    )


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    narrow = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}
    if tensor.dtype not in narrow:
        return tensor.numpy()
    return tensor.contiguous().view(torch.uint8).numpy().view(narrow[tensor.dtype]).reshape(tensor.shape)


def snr_db(expected: Tensor, found: Tensor) -> float:
    error = (expected.double() - found.double()).square().mean()
    return float(10 * torch.log10(expected.double().square().mean() / error))


@pytest.mark.parametrize(
    ("plan", "capability", "container"),
    [
        (W4A6, HOPPER, "int8"),
        (W4A8, HOPPER, "fp8"),
        (W4A8, ORIN, "fp16"),
        (replace(W4A6, asked_container="fp8"), HOPPER, "fp8"),
        (FREE_GROUPS, HOPPER, "int8"),
        (CHANNELS, ORIN, "int8"),
        (SIX_BITS, HOPPER, "fp8"),
    ],
)
def test_the_operators_compute_what_the_reference_does(plan: LayerPlan, capability: Capability, container: str) -> None:
    layer = layer_of(plan)
    kernels = KernelLinear.of(layer, capability, CPU)
    assert kernels is not None
    assert kernels.quantizer is not None
    assert (kernels.quantizer.container, kernels.product.container) == (container, container)
    x = torch.randn(2, 7, K, generator=torch.Generator().manual_seed(1))
    y = kernels.multiply(x, run_references)
    assert y.dtype == torch.float32
    assert snr_db(layer(x), y) > 120


@pytest.mark.parametrize("floats", [torch.float16, torch.bfloat16])
def test_weights_alone_are_multiplied_in_16_bits(floats: torch.dtype) -> None:
    layer = layer_of(WEIGHTS)
    kernels = KernelLinear.of(layer, ORIN, CPU)
    assert kernels is not None
    assert kernels.quantizer is None
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1)).to(floats)
    assert kernels.takes(x)
    assert not kernels.takes(x.float())
    y = kernels.multiply(x, run_references)
    assert y.dtype == floats
    assert torch.equal(y, layer(x.float()).to(floats)) or snr_db(layer(x.float()), y) > 45


def test_numbers_are_bitwise_the_layers_codes() -> None:
    layer = layer_of(W4A6)
    kernels = KernelLinear.of(layer, HOPPER, CPU)
    assert kernels is not None
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(1))
    numbers, scales, *_ = kernels.operands(x, run_references)
    quantized = layer.quantize_input(x)
    assert quantized is not None
    assert torch.equal(numbers.float() * get_format("e2m3").step, quantized[0])
    assert torch.equal(scales, quantized[1])


def test_strided_inputs_are_taken() -> None:
    layer = layer_of(W4A6)
    kernels = KernelLinear.of(layer, HOPPER, CPU)
    assert kernels is not None
    x = torch.randn(K, 6, generator=torch.Generator().manual_seed(1)).T
    assert snr_db(layer(x), kernels.multiply(x, run_references)) > 120


@pytest.mark.parametrize(
    "plan",
    [
        replace(CHANNELS, weight_format="e4m3", activation_format="e4m3"),
        replace(W4A6, scales="nvfp4", group_size=16, activation_format="e2m1"),
    ],
)
def test_layers_without_a_kernel_stay_the_reference(plan: LayerPlan) -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    fmt = get_format(plan.weight_format)
    groups = K // plan.group_size if plan.group_size else 1
    layer = QuantLinear(plan, round_to_nearest(weight, torch.ones(N, groups), fmt), None)
    assert KernelLinear.of(layer, HOPPER, CPU) is None


def test_unknown_gpus_have_no_kernels() -> None:
    assert KernelLinear.of(layer_of(W4A6), (7, 5), CPU) is None


def test_a_layer_is_packed_once_and_its_codes_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    layer, packed, x = layer_of(W4A6), PackedOnGpu(), torch.randn(3, K)
    kernels = packed.kernels(layer, x)
    assert kernels is not None
    assert packed.kernels(layer, x) is kernels
    assert layer.words.device == CPU
    assert packed.kernels(layer, x.clone().requires_grad_()) is None
    assert packed.kernels(layer, x.double()) is None


def test_a_layer_without_a_kernel_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (7, 5))
    packed, x = PackedOnGpu(), torch.randn(3, K)
    assert [packed.kernels(layer_of(W4A6), x) for _ in range(3)] == [None] * 3
    assert len(asked) == 1


def test_the_packed_weight_is_an_eighth_of_the_dequantized_one() -> None:
    layer = layer_of(CHANNELS)
    kernels = KernelLinear.of(layer, HOPPER, CPU)
    assert kernels is not None
    assert kernels.words.nbytes * 8 == layer.weight.nbytes


def test_compiled_layers_compute_the_reference() -> None:
    layer = layer_of(W4A6)
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(layer, backend="eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("plan", [W4A6, W4A8, SIX_BITS, WEIGHTS])
def test_gradients_reach_the_input(plan: LayerPlan) -> None:
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(1), requires_grad=True)
    layer_of(plan)(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
