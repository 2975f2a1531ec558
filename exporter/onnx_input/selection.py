"""Which linear layers of an ONNX model are quantized and how, and which stay in high precision and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from exporter.container_choice import choose_container, scale_multipliers
from exporter.errors import InputError, did_you_mean
from exporter.layer_rules import layer_patterns
from exporter.layer_section import HIGH_PRECISION, Scales
from exporter.onnx_input.linears import FoundLinear
from exporter.plan import LayerPlan, LinearShape, plan_layer
from exporter.presets import LayerScheme
from exporter.targets import Target
from plugins.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS

DEFAULT_ACTIVATION = "e2m3"
DEFAULT_GROUP = 128

SENSITIVE_MODULES = frozenset(
    {
        *("adaln_single", "caption_projection", "context_embedder", "embedder", "guidance_in", "img_in"),
        *("patch_embed", "pos_embed", "t_embedder", "time_embed", "time_embedding", "time_in", "time_text_embed"),
        *("timestep_embedder", "txt_in", "vector_in", "x_embedder", "y_embedder"),
        *("final_layer", "norm_out", "proj_in", "proj_out"),
    }
)
"""Embedders and final projections, as diffusion transformers call them outside their numbered blocks."""


@dataclass(frozen=True)
class FormatOptions:
    """What the command line asks for. `scales` None: foldable where the format leaves room, else one per channel;
    `group` None: DEFAULT_GROUP. `keep` are patterns of layers that stay in high precision."""

    weight: str
    activation: str = DEFAULT_ACTIVATION
    scales: Scales | None = None
    group: int | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for flag, name, known in (
            ("--format", self.weight, WEIGHT_FORMATS),
            ("--activation", self.activation, (*ACTIVATION_FORMATS, HIGH_PRECISION)),
        ):
            if name not in known:
                raise InputError(f"{flag}: unknown format {name!r}{did_you_mean(name, known)}")
        if self.scales == "channel" and self.group is not None:
            raise InputError(f"--group {self.group}: channel scales have no groups; use --scales foldable or group")
        if self.group is not None and self.group < 1:
            raise InputError(f"--group {self.group}: must be at least 1; one scale per row is --scales channel")


def format_options(
    weight: str | None, activation: str | None, scales: Scales | None, group: int | None, keep: tuple[str, ...]
) -> FormatOptions | None:
    """The options as they were given; None where none was. Raises `InputError` for details without a format."""
    if weight is not None:
        return FormatOptions(weight, activation or DEFAULT_ACTIVATION, scales, group, keep)
    given = {"--activation": activation, "--scales": scales, "--group": group, "--keep": keep}
    detail = next((flag for flag, value in given.items() if value), None)
    if detail is not None:
        raise InputError(f"{detail} needs a weight format beside it, for example --format e2m1")
    return None


@dataclass(frozen=True)
class KeptLinear:
    """A linear layer that is not quantized, and the reason."""

    name: str
    out_features: int
    in_features: int
    reason: str


@dataclass(frozen=True)
class Selection:
    """Every linear layer that was found is in one of the two, in the graph's order."""

    layers: tuple[LayerPlan, ...]
    kept: tuple[KeptLinear, ...]


def select_layers(linears: Sequence[FoundLinear], options: FormatOptions, target: Target, source: str) -> Selection:
    """Decide about every layer. `source` names the model in messages.

    Raises `InputError` for a `keep` pattern that matches none, when nothing is left to quantize, and for what the
    target cannot run.
    """
    if not linears:
        raise InputError(f"{source}: no linear layer found: no MatMul or Gemm has a constant matrix as a factor")
    names = [linear.name for linear in linears]
    for pattern in options.keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"--keep {pattern!r} matches no linear layer of {source}" + did_you_mean(pattern, layer_patterns(names))
            )
    layers: list[LayerPlan] = []
    kept: list[KeptLinear] = []
    for linear in linears:
        decided = _reason_to_keep(linear, options) or _planned(linear, options, target, source)
        if isinstance(decided, LayerPlan):
            layers.append(decided)
        else:
            kept.append(KeptLinear(linear.name, linear.out_features, linear.in_features, decided))
    if not layers:
        first = kept[0]
        raise InputError(
            f"{source}: nothing would be quantized: all {len(kept)} linear layers stay in high precision; "
            f"{first.name}: {first.reason}"
        )
    return Selection(tuple(layers), tuple(kept))


def _reason_to_keep(linear: FoundLinear, options: FormatOptions) -> str:
    if linear.refusal:
        return linear.refusal
    pattern = next((pattern for pattern in options.keep if fnmatchcase(linear.name, pattern)), None)
    if pattern is not None:
        return f"--keep {pattern}"
    module = _sensitive_module(linear.name)
    return "" if module is None else f"by default: {module} embeds or projects"


def _planned(linear: FoundLinear, options: FormatOptions, target: Target, source: str) -> LayerPlan | str:
    """The layer's plan, or why its rows cannot be divided into groups."""
    scheme = _scheme(linear, options, target, source)
    count, group = linear.in_features, scheme.group_size
    if group > count:
        return f"its {count} input features are fewer than a group of {group} (--group)"
    if group and count % group:
        return f"its {count} input features are no multiple of a group of {group} (--group)"
    shape = LinearShape(linear.out_features, count, linear.bias is not None)
    return plan_layer(linear.name, shape, scheme, source, target)


def _scheme(linear: FoundLinear, options: FormatOptions, target: Target, source: str) -> LayerScheme:
    group = options.group or DEFAULT_GROUP
    if options.scales is not None:
        size = 0 if options.scales == "channel" else group
        return LayerScheme(options.weight, size, options.scales, options.activation)
    foldable = LayerScheme(options.weight, group, "foldable", options.activation)
    container = choose_container(f"{source}: {linear.name}", foldable, linear.in_features, target)
    if len(scale_multipliers(foldable, container)) > 1:
        return foldable
    if options.group is not None:
        raise InputError(
            f"--group {options.group}: {options.weight} leaves no room for folding group scales; "
            "leave --group out for one scale per channel, or use --scales group"
        )
    return LayerScheme(options.weight, 0, "channel", options.activation)


def _sensitive_module(name: str) -> str | None:
    """The part of a module path, before any number, that names an embedder or a final projection."""
    for part in name.split("."):
        if part.isdecimal():
            return None
        if part in SENSITIVE_MODULES:
            return part
    return None
