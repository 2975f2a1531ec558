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
from exporter.layer_bytes import stored_bytes
from exporter.layer_checks import check_block_formats, check_compute, check_sizes
from exporter.layer_rules import LINEAR, check_rules, winning_rule
from exporter.layer_section import AUTO_FORMAT, HIGH_PRECISION, Scales
from exporter.presets import LayerScheme, candidate_schemes, preset_scheme, resolve_rule
from exporter.recipe import Recipe
from exporter.targets import Target
from plugins.block_scales import BLOCK_SCALINGS, BlockScaling
from plugins.container_product import ContainerProduct
from plugins.containers import CONTAINERS
from plugins.domain import AUTO_CONTAINER

_FP32_BYTES = 4


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

    `name` is its module path; that of a layer which is transformed first (by `low_rank`, `hadamard` or `output`,
    see `exporter.transforms`) ends with `LINEAR`. `group_size` weights of a row share a scale, 0 means the whole row;
    `activation_format` is "none" where only the weights are quantized; `container` is the number type that the target
    multiplies in, and `asked_container` what the recipe says about it ("auto" where nothing). `output_format` is
    "none" where the output stays as it is; else `output_group` numbers of a token share a scale, 0 means all.
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
    low_rank: int = 0
    hadamard: int = 0
    output_format: str = HIGH_PRECISION
    output_group: int = 0

    @property
    def original_name(self) -> str:
        """Its module path in the model as it was loaded."""
        return self.name.removesuffix(LINEAR) if self.is_transformed else self.name

    @property
    def is_transformed(self) -> bool:
        """Whether the model is changed around the layer before it is quantized."""
        return self.scheme.is_transformed

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
            self.weight_format,
            self.group_size,
            self.scales,
            self.activation_format,
            self.asked_container,
            self.low_rank,
            self.hadamard,
            self.output_format,
            self.output_group,
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
        if scheme is not None and scheme.low_rank:
            kept[f"{name}.low_rank"] = scheme.low_rank * (shape.in_features + shape.out_features)
    check_compute(recipe, layers, target)
    if not layers:
        raise InputError(f"{recipe.name}: nothing would be quantized: every layer stays in high precision")
    parameters = sum(shape.parameters for shape in shapes.linears.values()) + sum(shapes.others.values())
    # Layers of a size share the matrix.
    rotations = sum(size * size for size in {layer.hadamard for layer in layers})
    return Plan(
        layers=tuple(layers),
        high_precision=tuple(kept.items()),
        fp32_bytes=parameters * _FP32_BYTES,
        expected_bytes=sum(stored_bytes(layer, target) for layer in layers)
        + (sum(kept.values()) + rotations) * COMPUTE_TYPES[recipe.compute].bytes,
        compute=recipe.compute,
        open=tuple(opened),
    )


def _open_layer(
    name: str, shape: LinearShape, schemes: Sequence[LayerScheme], source: str, target: Target
) -> OpenLayer:
    """Those of `schemes` that the target runs in the container of the first, the first one of each format.

    Raises `InputError` where that leaves no choice, and for sizes that are wrong for all of them.
    """
    check_sizes(f"{source}: {name}", name, schemes[0], shape.out_features, shape.in_features)
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
    check_sizes(where, name, scheme, shape.out_features, shape.in_features)
    check_block_formats(where, scheme)
    container = choose_container(where, scheme, shape.in_features, target)
    if scheme.scales == "foldable" and len(scale_multipliers(scheme, container)) == 1:
        raise InputError(
            f"{where}: {scheme.weight_format} leaves no room for folding group scales; use `scales: channel`"
        )
    return LayerPlan(
        name=f"{name}{LINEAR}" if scheme.is_transformed else name,
        out_features=shape.out_features,
        in_features=shape.in_features,
        has_bias=shape.has_bias,
        weight_format=scheme.weight_format,
        activation_format=scheme.activation_format,
        group_size=scheme.group_size,
        scales=scheme.scales,
        container=container,
        asked_container=scheme.container,
        low_rank=scheme.low_rank,
        hadamard=scheme.hadamard,
        output_format=scheme.output_format,
        output_group=scheme.output_group,
    )
