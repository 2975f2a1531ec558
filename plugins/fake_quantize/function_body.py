"""The fake quantizer in standard ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from plugins.block_quantize.function_body import append_grouped
from plugins.body import Body
from plugins.float_quantize.function_body import append_online
from plugins.formats import Format

OnlineFn: TypeAlias = Callable[[Body, str], tuple[str, str]]
"""Appends a quantizer of a tensor's last axis; gives the names of its numbers and scales, which are multiplied."""


def append_fake_quantize(
    body: Body, x: str, output: str, fmt: Format, group_size: int, online: OnlineFn | None = None
) -> None:
    """x [..., N] → output [..., N]; a target's own `online` quantizer takes the place of the definition's."""
    grouped = append_grouped(body, x, group_size) if group_size else x
    if online is None:
        values, scales = f"{body.prefix}values", f"{body.prefix}scales"
        append_online(body, grouped, values, scales, fmt)
    else:
        values, scales = online(body, grouped)
    product = body.op("Mul", values, scales, output=None if group_size else output)
    if group_size:
        body.op("Reshape", product, body.op("Shape", x), output=output)
