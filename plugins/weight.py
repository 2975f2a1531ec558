"""What every operator that takes coded weights checks."""

from __future__ import annotations

from plugins.formats import WEIGHT_FORMATS, UnknownFormatError, get_format


class GroupError(ValueError):
    """A group size, or a shape of scales or multipliers, that does not belong to the weight."""


def check_weight(format_name: str, group_size: int, count: int) -> None:
    """Raise UnknownFormatError or GroupError unless [N, count] in groups of `group_size` can be weights.

    `group_size` 0 is a whole channel.
    """
    get_format(format_name)
    if format_name not in WEIGHT_FORMATS:
        raise UnknownFormatError(f"{format_name!r} is no weight format; valid: {', '.join(WEIGHT_FORMATS)}")
    if count < 1:
        raise GroupError(f"a weight has at least one input feature, not {count}")
    if group_size < 0 or (group_size and count % group_size):
        divisors = [size for size in range(1, count + 1) if count % size == 0]
        nearest = min(divisors, key=lambda size: (abs(size - group_size), size))
        raise GroupError(f"groups of {group_size} do not divide {count} input features; nearest: {nearest}")
