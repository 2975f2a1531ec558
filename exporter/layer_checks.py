"""What a layer's own sizes and formats rule out; messages begin with `where`, or with the recipe and the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from exporter.errors import InputError
from exporter.layer_section import HADAMARD_SIZES, HIGH_PRECISION, NO_SHIFT
from exporter.presets import LayerScheme
from exporter.recipe import Recipe
from exporter.targets import Target
from plugins.block_scales import BLOCK_SCALINGS
from plugins.formats import UNSIGNED_ACTIVATION_FORMATS

if TYPE_CHECKING:
    from exporter.plan import LayerPlan


def check_sizes(where: str, name: str, scheme: LayerScheme, out_features: int, in_features: int) -> None:
    """Raise `InputError` for what the sizes of the layer `name` rule out, whatever its formats."""
    _check_group(where, f"{name.split('.')[0]}.*", scheme.group_size, in_features)
    _check_transforms(where, scheme, out_features, in_features)


def check_block_formats(where: str, scheme: LayerScheme) -> None:
    """Raise `InputError` unless block scaling is asked for with its own formats."""
    scaling = BLOCK_SCALINGS.get(scheme.scales)
    if scaling is not None and {scheme.weight_format, scheme.activation_format} != {scaling.value_format}:
        raise InputError(
            f"{where}: `scales: {scaling.name}` is for {scaling.value_format} weights with {scaling.value_format} "
            f"activations, not {scheme.weight_format} with {scheme.activation_format}; use `scales: foldable`"
        )


def check_compute(recipe: Recipe, layers: Sequence[LayerPlan], target: Target) -> None:
    """Raise `InputError` for weights alone with FP32 activations in a plugin, which has no kernel for them."""
    for layer in layers:
        if layer.is_plugin(target) and layer.activation_format == HIGH_PRECISION and recipe.compute == "fp32":
            raise InputError(
                f"{recipe.name}: {layer.name}: plugins multiply weights alone with fp16 or bf16 activations; use "
                "`compute: fp16` (or bf16), or `kernels: native`"
            )


def check_sign(layer: LayerPlan, least: float) -> None:
    """Raise `InputError` for captured inputs down to `least`, if that is negative and their format has no sign."""
    if layer.activation_format not in UNSIGNED_ACTIVATION_FORMATS or least >= 0:
        return
    advice = "behind a GELU add `shift: gelu`, elsewhere"
    if layer.shift != NO_SHIFT:
        advice = f"no {layer.shift.upper()} makes them: drop `shift: {layer.shift}` and"
    raise InputError(
        f"{layer.original_name}: `activation: {layer.activation_format}` has no sign, and captured inputs go down to "
        f"{least:.3g}; {advice} use a format with a sign, such as e2m3"
    )


def _check_group(where: str, pattern: str, group: int, in_features: int) -> None:
    """Raise `InputError` unless groups divide a row; `pattern` matches the layer in the rule that is proposed."""
    if not group or in_features % group == 0:
        return
    nearest = _nearest_divisor(in_features, group)
    raise InputError(
        f"{where}: group {group} does not divide its {in_features} input features; nearest that does: {nearest}, for "
        f"example a rule {{match: {pattern}, group: {nearest}}}"
    )


def _check_transforms(where: str, scheme: LayerScheme, out_features: int, in_features: int) -> None:
    """Raise `InputError` for a rank that the weight itself may not exceed, for rotations that do not fit a row, and for
    groups that do not divide the output."""
    largest = min(in_features, out_features) - 1
    if scheme.low_rank > largest:
        raise InputError(
            f"{where}: low_rank {scheme.low_rank} is too much for a weight of {out_features} x {in_features}; at most "
            f"{largest}, and 16 to 64 are usual"
        )
    if scheme.hadamard and in_features % scheme.hadamard:
        fitting = max(size for size in HADAMARD_SIZES if not size or in_features % size == 0)
        raise InputError(
            f"{where}: hadamard {scheme.hadamard} does not divide its {in_features} input features; "
            + (f"nearest that does: {fitting}" if fitting else "no size does: leave it out")
        )
    if scheme.output_group and out_features % scheme.output_group:
        raise InputError(
            f"{where}: output_group {scheme.output_group} does not divide its {out_features} output features; nearest "
            f"that does: {_nearest_divisor(out_features, scheme.output_group)}"
        )


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = (candidate for candidate in range(1, number + 1) if number % candidate == 0)
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))
