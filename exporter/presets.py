"""Presets: the formats that a recipe's layers get where no rule of its own says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from exporter.layer_section import HIGH_PRECISION, LayerRule, Scales
from exporter.recipe import Preset
from plugins.block_scales import BLOCK_SCALINGS
from plugins.domain import AUTO_CONTAINER
from plugins.formats import WEIGHT_FORMATS, FloatFormat, get_format


@dataclass(frozen=True)
class LayerScheme:
    """How one layer is quantized, nothing left open.

    `weight_format` may be "auto", which stands for `candidate_schemes`. `group_size` weights of a row share a scale
    (0: the whole row, which is what `scales` "channel" means); with block
    scaling activations have groups of as many;
    `activation_format` is "none" where only weights are quantized; `container` is the number type that was asked for,
    "auto" for the target's best; `low_rank` and `hadamard` (0: none) change the layer before it is quantized, see
    `exporter.transforms`; `output_format` is "none" where its output stays as it is, else numbers of a token in groups
    of `output_group` (0: all of them) share a scale.
    """

    weight_format: str
    group_size: int
    scales: Scales
    activation_format: str
    container: str = AUTO_CONTAINER
    low_rank: int = 0
    hadamard: int = 0
    output_format: str = HIGH_PRECISION
    output_group: int = 0

    @property
    def is_transformed(self) -> bool:
        """Whether the layer becomes a `TransformedLinear`, of which what is quantized is a part."""
        return bool(self.low_rank or self.hadamard) or self.output_format != HIGH_PRECISION


PRESETS: Mapping[Preset, LayerScheme] = MappingProxyType(
    {
        "w4a6": LayerScheme("e2m1", 128, "foldable", "e2m3"),
        "w4a8": LayerScheme("e2m1", 128, "foldable", "e4m3"),
        "w4a8_int": LayerScheme("e2m1", 128, "foldable", "int8"),
        "w8a8": LayerScheme("e4m3", 0, "channel", "e4m3"),
        "w4a16": LayerScheme("e2m1", 128, "foldable", HIGH_PRECISION),
        "nvfp4": LayerScheme("e2m1", 16, "nvfp4", "e2m1"),
        "mxfp8": LayerScheme("e4m3", 32, "mx", "e4m3"),
    }
)

# What a rule starts from in a recipe without a preset.
_NO_PRESET = PRESETS["w4a16"]


def preset_scheme(preset: Preset | None, container: str = AUTO_CONTAINER) -> LayerScheme | None:
    """The scheme of the layers that no rule wins, None without a preset; `container` is the recipe's."""
    return None if preset is None else replace(PRESETS[preset], container=container)


def resolve_rule(rule: LayerRule, preset: Preset | None, container: str = AUTO_CONTAINER) -> LayerScheme | None:
    """The scheme of the layers that `rule` wins, gaps filled from the preset and from the recipe's `container`; None
    keeps them in high precision.

    Giving only `scales: channel` drops the preset's group, giving only `group: 0` means channel scales, and a group
    on top of a preset with channel scales or block scaling makes them foldable. Block scaling brings its own group and
    formats.
    """
    if rule.weight == HIGH_PRECISION:
        return None
    start = PRESETS[preset] if preset is not None else _NO_PRESET
    if rule.scales in BLOCK_SCALINGS:
        start = next(scheme for scheme in PRESETS.values() if scheme.scales == rule.scales)
    scales, group = rule.scales, rule.group
    if scales is None and group is None:
        scales, group = start.scales, start.group_size
    elif scales is None:
        grouped = "foldable" if start.scales not in ("group", "foldable") else start.scales
        scales = grouped if group else "channel"
    if group is None:
        own = start.scales == scales or start.scales in ("group", "foldable")
        group = 0 if scales == "channel" else start.group_size if own else _NO_PRESET.group_size
    return LayerScheme(
        weight_format=start.weight_format if rule.weight is None else rule.weight,
        group_size=group,
        scales=scales,
        activation_format=start.activation_format if rule.activation is None else rule.activation,
        container=container if rule.container is None else rule.container,
        low_rank=rule.low_rank,
        hadamard=rule.hadamard,
        output_format=rule.output,
        output_group=rule.output_group,
    )


def candidate_schemes(scheme: LayerScheme, preset: Preset | None) -> tuple[LayerScheme, ...]:
    """What `weight: auto` may become: `scheme` with each float of as many bits as the preset's weights, whose own
    format comes first. Foldable scales are followed by channel scales, for formats without room to fold."""
    own = (PRESETS[preset] if preset is not None else _NO_PRESET).weight_format
    bits = get_format(own).bits
    floats = [name for name in WEIGHT_FORMATS if isinstance(get_format(name), FloatFormat)]
    names = [own, *(name for name in floats if name != own and get_format(name).bits == bits)]
    schemes = []
    for name in names:
        schemes.append(replace(scheme, weight_format=name))
        if scheme.scales == "foldable":
            schemes.append(replace(scheme, weight_format=name, scales="channel", group_size=0))
    return tuple(schemes)
