"""What a layer's own sizes and formats rule out, whatever the target; every message begins with `where`."""

from __future__ import annotations

from exporter.errors import InputError
from exporter.presets import LayerScheme
from plugins.block_scales import BLOCK_SCALINGS


def check_group(where: str, pattern: str, group: int, in_features: int) -> None:
    """Raise `InputError` unless groups divide a row; `pattern` matches the layer in the rule that is proposed."""
    if not group or in_features % group == 0:
        return
    nearest = _nearest_divisor(in_features, group)
    raise InputError(
        f"{where}: group {group} does not divide its {in_features} input features; nearest that does: {nearest}, for "
        f"example a rule {{match: {pattern}, group: {nearest}}}"
    )


def check_block_formats(where: str, scheme: LayerScheme) -> None:
    """Raise `InputError` unless block scaling is asked for with its own formats."""
    scaling = BLOCK_SCALINGS.get(scheme.scales)
    if scaling is not None and {scheme.weight_format, scheme.activation_format} != {scaling.value_format}:
        raise InputError(
            f"{where}: `scales: {scaling.name}` is for {scaling.value_format} weights with {scaling.value_format} "
            f"activations, not {scheme.weight_format} with {scheme.activation_format}; use `scales: foldable`"
        )


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = (candidate for candidate in range(1, number + 1) if number % candidate == 0)
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))
