"""What the fake quantizer computes, in numpy, float32 throughout."""

from __future__ import annotations

from plugins.float_quantize.reference import quantize_online
from plugins.formats import Format, Values


def fake_quantize(x: Values, fmt: Format, group_size: int = 0) -> Values:
    """x float32 [..., N] rounded to the format's grid, with one scale per `group_size` neighbours (0: per token)."""
    grouped = x.reshape(*x.shape[:-1], -1, group_size or x.shape[-1])
    values, scales = quantize_online(grouped, fmt)
    rounded: Values = (values * scales).reshape(x.shape)
    return rounded
