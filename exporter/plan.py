"""The plan: what every layer of a model becomes under a recipe, on a target, before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from exporter.compute import COMPUTE_TYPES, Compute
from exporter.container_choice import (
    choose_container,
    container_product,
    has_kernel,
    needs_vnni,
    scale_multipliers,
)
from exporter.errors import InputError
from exporter.layer_checks import check_block_formats, check_group
from exporter.layer_rules import check_rules, winning_rule
from exporter.presets import LayerScheme, candidate_schemes, preset_scheme, resolve_rule
from exporter.recipe import AUTO_FORMAT, HIGH_PRECISION, Recipe, Scales
from exporter.targets import Target
from plugins.block_scales import BLOCK_SCALINGS, BlockScaling
from plugins.container_product import ContainerProduct
from plugins.containers import CONTAINERS
from plugins.domain import AUTO_CONTAINER
from plugins.formats import get_format
from plugins.packed_linear.layout import Layout
from plugins.packing import words_per_row

_FP32_BYTES = 4
_WORD_BYTES = 4


@dataclass(frozen=True)
class LinearShape:
    """A linear layer's weight is [out_features, in_features]."""

    out_features: int
    in_features: int
    has_bias: bool

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.out_features * (self.in_features + self.has_bias)


@dataclass(frozen=True)
class ModelShapes:
    """Module path → shape of every linear layer, and parameter count of everything else, in the model's order."""

    linears: Mapping[str, LinearShape]
    others: Mapping[str, int]


@dataclass(frozen=True)
class LayerPlan:
    """One quantized layer.

    `group_size` weights of a row share a scale, 0 means the whole row; `activation_format` is "none" where only
    the weights are quantized; `container` is the number type that the target multiplies in, and `asked_container`
    what the recipe says about it ("auto" where nothing).
    """

    name: str
    out_features: int
    in_features: int
    has_bias: bool
    weight_format: str
    activation_format: str
    group_size: int
    scales: Scales
    container: str
    asked_container: str = AUTO_CONTAINER

    @property
    def scaling(self) -> BlockScaling | None:
        """The block scaling of weights and activations, None for other scales."""
        return BLOCK_SCALINGS.get(self.scales)

    @property
    def groups(self) -> int:
        """Scales per row."""
        return self.in_features // self.group_size if self.group_size else 1

    @property
    def multipliers(self) -> tuple[int, ...]:
        """The integers that foldable scales choose from; (1,) for other scales."""
        return scale_multipliers(self.scheme, self.container)

    @property
    def scheme(self) -> LayerScheme:
        """How the layer is quantized, as asked for."""
        return LayerScheme(
            self.weight_format, self.group_size, self.scales, self.activation_format, self.asked_container
        )

    @property
    def product(self) -> ContainerProduct | None:
        """What multiplying the layer in its container means; None for block scaling, whose scales are in the sums."""
        if self.scaling is not None:
            return None
        return container_product(self.scheme, self.in_features, CONTAINERS[self.container])

    @property
    def fp32_bytes(self) -> int:
        """Size of weights and biases in the model as it is."""
        return LinearShape(self.out_features, self.in_features, self.has_bias).parameters * _FP32_BYTES

    def is_plugin(self, target: Target) -> bool:
        """Whether a plugin of ours multiplies the layer on the target."""
        return target.kernels == "plugin" and has_kernel(self.scheme, self.in_features)

    def stored_bytes(self, target: Target) -> int:
        """Expected size in the output: weights, scales, group multipliers and bias.

        ONNX Runtime's file, and plugins, keep packed codes and a byte per group multiplier; TensorRT's own kernels have
        weights in their container, group scales folded in; block scales are a byte each there.
        """
        fmt = get_format(self.weight_format)
        folded = self.out_features * self.groups if self.scales == "foldable" else 0
        if self.is_plugin(target):
            layout = Layout(fmt, self.in_features, self.group_size, twos_complement=False)
            weights = self.out_features * layout.words * _WORD_BYTES
        elif target.engine == "onnxruntime":
            weights = self.out_features * words_per_row(self.in_features, fmt.bits) * _WORD_BYTES
        else:
            weights = self.out_features * self.in_features // (2 if self.container in ("int4", "fp4") else 1)
            folded = 0
        if self.container in ("fp4", "mxfp8"):
            return weights + self.out_features * (self.groups + self.has_bias * _FP32_BYTES)
        scales = self.out_features * (1 if self.scales in ("channel", "foldable") else self.groups) * _FP32_BYTES
        return weights + folded + scales + self.out_features * self.has_bias * _FP32_BYTES


@dataclass(frozen=True)
class OpenLayer:
    """A layer with `weight: auto`: what it may become, and the formats that it may not, with the reason."""

    candidates: tuple[LayerPlan, ...]
    refused: Mapping[str, str]

    @property
    def name(self) -> str:
        """The layer's module path."""
        return self.candidates[0].name


@dataclass(frozen=True)
class Plan:
    """All quantized layers in the model's order, the modules that stay in high precision with their parameter counts,
    and sizes: `fp32_bytes` of the model as it is, `expected_bytes` of the output (an upper bound, since exact
    constants may be stored in half precision). `compute` is the type of high precision. Layers that are still `open`
    stand among the layers as their first candidates.
    """

    layers: tuple[LayerPlan, ...]
    high_precision: tuple[tuple[str, int], ...]
    fp32_bytes: int
    expected_bytes: int
    compute: Compute = "fp32"
    open: tuple[OpenLayer, ...] = ()

    def vnni_note(self, target: Target) -> str:
        """What an exact result on a CPU asks of it; "" where any will do."""
        layers = [layer for layer in self.layers if needs_vnni(layer.product)]
        if target.engine != "onnxruntime" or not layers:
            return ""
        return (
            f"{len(layers)} layers multiply with {layers[0].activation_format} activations, which is exact on x86 CPUs "
            "with VNNI only (others add pairs of products in 16 bits and saturate); e2m3 activations are exact on all"
        )

    def decided(self, formats: Mapping[str, str]) -> Plan:
        """The plan with open layers in these weight formats, by module path."""
        chosen = {
            candidate.name: candidate
            for layer in self.open
            for candidate in layer.candidates
            if candidate.weight_format == formats[layer.name]
        }
        return replace(self, layers=tuple(chosen.get(layer.name, layer) for layer in self.layers), open=())

    def layer(self, name: str) -> LayerPlan:
        """The plan of the layer with this module path. Raises `KeyError`."""
        return {layer.name: layer for layer in self.layers}[name]


def plan_layers(recipe: Recipe, shapes: ModelShapes, high_precision: Sequence[str], target: Target) -> Plan:
    """Decide formats and containers of every linear layer.

    The first rule of the recipe that matches a layer's module path wins; layers that no rule matches get the preset,
    unless they match one of the family's `high_precision` patterns. Raises `InputError` for a rule that wins no
    layer, a group that does not divide a row, scales that cannot be folded, and what the target cannot run.
    """
    names = list(shapes.linears)
    won = [winning_rule(name, recipe.layers) for name in names]
    check_rules(recipe, names, won, shapes.others)
    layers, opened = [], []
    kept = dict(shapes.others)
    for name, rule in zip(names, won, strict=True):
        shape = shapes.linears[name]
        if rule is not None:
            scheme = resolve_rule(recipe.layers[rule], recipe.preset, recipe.container)
            source = f"layers[{rule}]"
        elif any(fnmatchcase(name, pattern) for pattern in high_precision):
            scheme, source = None, ""
        else:
            scheme, source = preset_scheme(recipe.preset, recipe.container), f"preset {recipe.preset}"
        if scheme is None:
            kept[name] = shape.parameters
        elif scheme.weight_format == AUTO_FORMAT:
            schemes = candidate_schemes(scheme, recipe.preset)
            opened.append(_open_layer(name, shape, schemes, f"{recipe.name}: {source}", target))
            layers.append(opened[-1].candidates[0])
        else:
            layers.append(plan_layer(name, shape, scheme, f"{recipe.name}: {source}", target))
    _check_compute_of_weight_only(recipe, layers, target)
    if not layers:
        raise InputError(f"{recipe.name}: nothing would be quantized: every layer stays in high precision")
    parameters = sum(shape.parameters for shape in shapes.linears.values()) + sum(shapes.others.values())
    return Plan(
        layers=tuple(layers),
        high_precision=tuple(kept.items()),
        fp32_bytes=parameters * _FP32_BYTES,
        expected_bytes=sum(layer.stored_bytes(target) for layer in layers)
        + sum(kept.values()) * COMPUTE_TYPES[recipe.compute].bytes,
        compute=recipe.compute,
        open=tuple(opened),
    )


def _check_compute_of_weight_only(recipe: Recipe, layers: Sequence[LayerPlan], target: Target) -> None:
    for layer in layers:
        if layer.is_plugin(target) and layer.activation_format == HIGH_PRECISION and recipe.compute == "fp32":
            raise InputError(
                f"{recipe.name}: {layer.name}: plugins multiply weights alone with fp16 or bf16 activations; use "
                "`compute: fp16` (or bf16), or `kernels: native`"
            )


def _open_layer(
    name: str, shape: LinearShape, schemes: Sequence[LayerScheme], source: str, target: Target
) -> OpenLayer:
    """Those of `schemes` that the target runs in the container of the first, the first one of each format.

    Raises `InputError` where that leaves no choice.
    """
    candidates: dict[str, LayerPlan] = {}
    refused: dict[str, str] = {}
    for scheme in schemes:
        fmt = scheme.weight_format
        if fmt in candidates:
            continue
        try:
            candidate = plan_layer(name, shape, scheme, source, target)
        except InputError as error:
            refused.setdefault(fmt, str(error).removeprefix(f"{source}: {name}: "))
            continue
        first = next(iter(candidates.values()), candidate)
        if candidate.container == first.container:
            candidates[fmt] = candidate
        else:
            refused[fmt] = f"{candidate.container} instead of {first.container}"
    others = {fmt: reason for fmt, reason in refused.items() if fmt not in candidates}
    if len(candidates) < 2:
        reasons = "; ".join(f"{fmt}: {reason}" for fmt, reason in others.items()) or "no other format has as many bits"
        raise InputError(f"{source}: {name}: `weight: auto` has nothing to choose from: {reasons}; name a format")
    return OpenLayer(tuple(candidates.values()), others)


def plan_layer(name: str, shape: LinearShape, scheme: LayerScheme, source: str, target: Target) -> LayerPlan:
    """The plan of one layer under `scheme`, which `source` asked for.

    Raises `InputError` for a group that does not divide a row, scales that cannot be folded, and what the target
    cannot run.
    """
    where = f"{source}: {name}"
    check_group(where, f"{name.split('.')[0]}.*", scheme.group_size, shape.in_features)
    check_block_formats(where, scheme)
    container = choose_container(where, scheme, shape.in_features, target)
    if scheme.scales == "foldable" and len(scale_multipliers(scheme, container)) == 1:
        raise InputError(
            f"{where}: {scheme.weight_format} leaves no room for folding group scales; use `scales: channel`"
        )
    return LayerPlan(
        name=name,
        out_features=shape.out_features,
        in_features=shape.in_features,
        has_bias=shape.has_bias,
        weight_format=scheme.weight_format,
        activation_format=scheme.activation_format,
        group_size=scheme.group_size,
        scales=scheme.scales,
        container=container,
        asked_container=scheme.container,
    )
