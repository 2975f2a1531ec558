"""Quantized weights, the module that computes with them, and their file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.codes import encode_grid_values, nearest_codes
from exporter.cores import on_every_core
from exporter.cuda.linear import PackedOnGpu
from exporter.decoded_weights import unpacked_codes, unpacked_weight
from exporter.errors import InputError
from exporter.output_quantizer import quantize_outputs
from exporter.plan import LayerPlan, Plan
from exporter.rounding import InputQuantizer, dequantize
from exporter.symbolic import is_traced, symbolic_linear
from exporter.tensor_files import atomic_tensor_path
from plugins.formats import Format, get_format
from plugins.packing import pack, unpack

_METADATA = "fp4export.quantized"


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as it ships: `codes` uint8 [N, K] of the format, and `scales` float32 [N, G], G groups along K.

    A weight is decode(code)·scale. Scales have few enough significand bits that foldable ones are s·m exactly.
    `input_scale` float32 [] is the static scale of the layer's input where its block scaling has one.
    """

    codes: Tensor
    scales: Tensor
    input_scale: Tensor | None = None

    @classmethod
    def from_values(
        cls, values: Tensor, scales: Tensor, fmt: Format, input_scale: Tensor | None = None
    ) -> QuantizedWeight:
        """Encode `values` [N, K], which lie on the format's grid in units of `scales` [N, G]."""
        return cls(encode_grid_values(values.detach().cpu(), fmt), scales.detach().cpu().contiguous(), input_scale)

    def dequantize(self, fmt: Format) -> Tensor:
        """Return the weight float32 [N, K]."""
        values = torch.tensor(fmt.values, device=self.codes.device)[self.codes.int()]
        groups = self.scales.shape[1]
        values.view(len(values), groups, -1).mul_(self.scales.unsqueeze(-1))
        return values


def expand_scales(scales: Tensor, count: int) -> Tensor:
    """Repeat group scales [N, G] along the row so that they meet a weight's `count` = K columns: [N, K]."""
    return scales.repeat_interleave(count // scales.shape[1], dim=1)


def round_to_nearest(weight: Tensor, scales: Tensor, fmt: Format, input_scale: Tensor | None = None) -> QuantizedWeight:
    """Quantize `weight` [N, K] by rounding to nearest on `scales` [N, G]; zeros are positive."""
    ratios = (weight.reshape(*scales.shape, -1) / scales.unsqueeze(-1)).flatten(1)
    codes = nearest_codes(ratios.detach(), fmt)
    return QuantizedWeight(codes.cpu(), scales.detach().cpu().contiguous(), input_scale)


def input_quantizer(plan: LayerPlan, input_scale: Tensor | None) -> InputQuantizer | None:
    """Return how the planned layer's input is quantized; None for a weight-only layer."""
    if plan.activation_format == "none":
        return None
    return InputQuantizer(get_format(plan.activation_format), plan.scaling, input_scale)


class QuantLinear(nn.Module):
    """A linear layer with a quantized weight and, unless its activation format is "none", a quantized input.

    The input is quantized online, per token or in blocks. The weight is held as packed words and decoded anew in
    every call, so that a model takes no more memory than its file. While torch.export traces it, the layer becomes the
    waist's nodes. On a CUDA device our kernels compute it where they can (`exporter.cuda.linear.PackedOnGpu`).
    """

    words: Tensor
    scales: Tensor
    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, plan: LayerPlan, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.layer = plan.name
        self.weight_format = plan.weight_format
        self.activation_format = plan.activation_format
        self.group_size = plan.group_size
        self.scaling = plan.scaling
        self.asked_container = plan.asked_container
        self.in_features = plan.in_features
        self.out_features = plan.out_features
        words = torch.from_numpy(pack(weight.codes.numpy(force=True), get_format(plan.weight_format).bits))
        self.register_buffer("words", words.to(weight.codes.device))
        self.register_buffer("scales", weight.scales)
        self.register_buffer("input_scale", weight.input_scale)
        self.register_buffer("bias", bias)
        self._on_gpu = PackedOnGpu()

    @property
    def codes(self) -> Tensor:
        """The weight's codes uint8 [N, K], on the device of the scales."""
        return unpacked_codes(self.words, get_format(self.weight_format), self.in_features).to(self.scales.device)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight float32 [N, K]."""
        return unpacked_weight(self.words, self.scales, get_format(self.weight_format), self.in_features)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the input's (values [..., K] on the unit grid, scales [..., 1] or [..., K/G]).

        None for a weight-only layer.
        """
        if self.activation_format == "none":
            return None
        return InputQuantizer(get_format(self.activation_format), self.scaling, self.input_scale).quantize(x)

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [..., K] → [..., N]; with kernels also float16 and bfloat16."""
        if is_traced():
            return symbolic_linear(self, x)
        y = self._on_gpu.multiply(self, x)
        if y is not None:
            return y
        quantized = self.quantize_input(x)
        return F.linear(x if quantized is None else dequantize(*quantized), self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # What was packed for one device is not for another.
        self._on_gpu = PackedOnGpu()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Name the sizes and formats in the module's printout."""
        return (
            f"{self.in_features}, {self.out_features}, weight={self.weight_format}, "
            f"group={self.group_size}, activation={self.activation_format}"
        )


def share_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of `model` but not its numbers: both use the same memory. The copy's weights are frozen."""
    shared: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, shared)


def planned_linear(model: nn.Module, plan: LayerPlan) -> nn.Linear:
    """Return the linear layer that `plan` speaks of. Raises `ValueError` where the model has none like it."""
    module = dict(model.named_modules()).get(plan.name)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{plan.name}: the model has no linear layer of this name")
    if module.weight.shape != (plan.out_features, plan.in_features) or (module.bias is not None) != plan.has_bias:
        raise ValueError(f"{plan.name}: the model's layer is {module}, which is not what was planned")
    return module


def quantize_model(model: nn.Module, plan: Plan, weights: Mapping[str, QuantizedWeight]) -> nn.Module:
    """Return a model whose planned linears are `QuantLinear`s; `model` stays as it is.

    Everything that is not quantized shares its memory with `model`. Raises `ValueError` where plan and model, or
    plan and weights, do not agree.
    """
    quantized = share_copy(model)
    for layer in plan.layers:
        linear = planned_linear(model, layer)
        weight = weights.get(layer.name)
        if weight is None or weight.codes.shape != linear.weight.shape:
            raise ValueError(f"{layer.name}: no quantized weight of shape {list(linear.weight.shape)} was given")
        bias = None if linear.bias is None else linear.bias.detach()
        device = linear.weight.device
        input_scale = None if weight.input_scale is None else weight.input_scale.to(device)
        moved = QuantizedWeight(weight.codes.to(device), weight.scales.to(device), input_scale)
        quantized.set_submodule(layer.name, QuantLinear(layer, moved, bias))
    quantize_outputs(quantized, plan.layers)
    return quantized.eval()


@dataclass(frozen=True)
class BlockStatistics:
    """What learned rounding gained on one block, or on one layer outside the blocks.

    Errors are squared errors of the block's output relative to the original output's power, on the same inputs: as the
    roundings began, and as shipped. They are equal where the first roundings were kept because they were better.
    """

    name: str
    error_start: float
    error_calibrated: float
    seconds: float


@dataclass(frozen=True)
class CalibrationResult:
    """Quantized weights by layer, and the statistics of every block whose rounding was learned."""

    weights: Mapping[str, QuantizedWeight]
    blocks: tuple[BlockStatistics, ...] = ()


def save_quantized(path: Path, result: CalibrationResult, plan: Plan) -> None:
    """Write safetensors: `<layer>.words` (packed codes), `<layer>.scales` and, for layers that have one,
    `<layer>.input_scale`, the plan's facts as metadata.

    The same result gives the same bytes, so the seconds that blocks took are left out.
    """

    def packed(layer: LayerPlan) -> Tensor:
        codes = result.weights[layer.name].codes.cpu().numpy()
        return torch.from_numpy(pack(codes, get_format(layer.weight_format).bits))

    tensors: dict[str, Tensor] = {}
    for layer, words in zip(plan.layers, on_every_core(packed, plan.layers), strict=True):
        weight = result.weights[layer.name]
        tensors[f"{layer.name}.words"] = words
        tensors[f"{layer.name}.scales"] = weight.scales.cpu().contiguous()
        if weight.input_scale is not None:
            tensors[f"{layer.name}.input_scale"] = weight.input_scale.cpu()
    blocks = [asdict(replace(block, seconds=0.0)) for block in result.blocks]
    # One key only: safetensors writes several in an order that differs between runs.
    metadata = {_METADATA: json.dumps({"layers": _facts(plan), "blocks": blocks}, sort_keys=True)}
    with atomic_tensor_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_quantized(path: Path, plan: Plan) -> CalibrationResult:
    """Read what `save_quantized` wrote for the same plan. Raises `InputError` naming what does not fit it."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(_METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
        if metadata is None:
            raise InputError(f"{path}: not a file of quantized weights; run the export again to make one")
        facts = json.loads(metadata)
        layers, blocks = facts["layers"], tuple(BlockStatistics(**entry) for entry in facts["blocks"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as quantized weights: {error}") from error
    for found, wanted in zip_longest(layers, _facts(plan)):
        if found != wanted:
            name = (wanted or found)["name"]
            raise InputError(f"{path}: {name}: made for {found}, but the plan is {wanted}; run the export again")
    names = {f"{layer.name}.{part}" for layer in plan.layers for part in _parts(layer)}
    if names != tensors.keys():
        raise InputError(f"{path}: tensors missing or unexpected: {', '.join(sorted(names ^ tensors.keys()))}")
    weights = on_every_core(lambda layer: _unpack_layer(path, layer, tensors), plan.layers)
    return CalibrationResult({layer.name: weight for layer, weight in zip(plan.layers, weights, strict=True)}, blocks)


def _parts(layer: LayerPlan) -> tuple[str, ...]:
    has_input_scale = layer.scaling is not None and layer.scaling.has_tensor_scale
    return ("words", "scales", "input_scale") if has_input_scale else ("words", "scales")


def _facts(plan: Plan) -> list[dict[str, Any]]:
    """What codes and scales depend on, per layer: not the container, though the multipliers that it allows."""
    names = ("name", "out_features", "in_features", "weight_format", "group_size", "scales")
    return [
        {name: getattr(layer, name) for name in names} | {"multipliers": list(layer.multipliers)}
        for layer in plan.layers
    ]


def _unpack_layer(path: Path, layer: LayerPlan, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    words, scales = tensors[f"{layer.name}.words"], tensors[f"{layer.name}.scales"]
    groups = layer.in_features // layer.group_size if layer.group_size else 1
    if scales.dtype != torch.float32 or scales.shape != (layer.out_features, groups):
        raise InputError(f"{path}: {layer.name}.scales: {scales.dtype} {list(scales.shape)} does not fit the plan")
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise InputError(f"{path}: {layer.name}.scales: must be finite and positive")
    fmt = get_format(layer.weight_format)
    try:
        codes = unpack(words.numpy(), fmt.bits, layer.in_features)
    except ValueError as error:
        raise InputError(f"{path}: {layer.name}.words: {error}") from error
    if len(codes) != layer.out_features or not (fmt.valid.all() or fmt.valid[codes].all()):
        raise InputError(f"{path}: {layer.name}.words: not {layer.out_features} rows of {fmt.name} codes")
    input_scale = tensors.get(f"{layer.name}.input_scale")
    if input_scale is not None and not (input_scale.shape == () and 0 < float(input_scale) < torch.inf):
        raise InputError(f"{path}: {layer.name}.input_scale: must be one finite and positive number")
    return QuantizedWeight(torch.from_numpy(codes), scales, input_scale)
