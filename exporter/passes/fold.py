"""Group scales that are integer multiples of one scale per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from exporter.passes.surgery import array_of, variant_of
from exporter.targets import Target
from plugins.containers import CONTAINERS, INT8, Container, multipliers
from plugins.formats import get_format
from plugins.op import Gemm


def fold_scales(graph: gs.Graph, target: Target) -> int:
    """FloatGemm with scales [N, G] → FloatGemm with scales [N, 1] and integer multipliers [N, G], when that is exact.

    The proof is bitwise: channel scale times multiplier, in float32, is the group scale for every group, and every
    multiplier leaves the weight format exact in the container asked for, or in one of the target's. One group a row
    is a channel already: it becomes group size 0. Block scaling and everything else stays as it is.
    """
    changed = 0
    for node in graph.nodes:
        gemm = variant_of(node, Gemm)
        if gemm is None or not gemm.has_group_scales or gemm.scaling is not None:
            continue
        scales_at = gemm.input_names.index("weight_scales")
        scales = array_of(node.inputs[scales_at])
        if scales is None:
            continue
        if scales.shape[1] == 1:
            _become(node, replace(gemm, group_size=0))
            changed += 1
            continue
        factors = _fold_for(scales, gemm.weight_format, _containers(node, target))
        if factors is None:
            continue
        layer = node.attrs["layer"]
        channel, groups = factors
        node.inputs[scales_at] = gs.Constant(f"{layer}.channel_scales", channel)
        node.inputs.insert(scales_at + 1, gs.Constant(f"{layer}.multipliers", groups))
        _become(node, replace(gemm, has_multipliers=True))
        changed += 1
    return changed


def _containers(node: gs.Node, target: Target) -> list[Container]:
    """The one that the node asks for, else the target's, best first."""
    asked = node.attrs["container"]
    return [CONTAINERS[name] for name in ((asked,) if asked else target.containers) if name in CONTAINERS] or [INT8]


def _fold_for(
    scales: npt.NDArray[np.float32], weight_format: str, containers: Sequence[Container]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]] | None:
    for container in containers:
        factors = fold_rows(scales, multipliers(get_format(weight_format), container))
        if factors is not None:
            return factors
    return None


def fold_rows(
    scales: npt.NDArray[np.float32], allowed: Sequence[int]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]] | None:
    """Channel scales f32 [N, 1] and multipliers i32 [N, G] out of `allowed` with channel·multiplier == scales [N, G].

    Exact in float32 for every group, or None. The row's smallest scale is tried as 1, 2, 3, … times the channel's.
    """
    channel = np.zeros((len(scales), 1), np.float32)
    groups = np.zeros(scales.shape, np.int32)
    open_rows = np.flatnonzero((scales > 0).all(axis=1) & np.isfinite(scales).all(axis=1))
    if len(open_rows) < len(scales):
        return None
    for smallest in allowed:
        rows = scales[open_rows]
        base = rows.min(axis=1, keepdims=True) / np.float32(smallest)
        ratio = np.rint(rows / base)
        exact = (base * ratio == rows) & np.isin(ratio, allowed)
        proven = exact.all(axis=1)
        channel[open_rows[proven]] = base[proven]
        groups[open_rows[proven]] = ratio[proven].astype(np.int32)
        open_rows = open_rows[~proven]
        if not len(open_rows):
            return channel, groups
    return None


def _become(node: gs.Node, gemm: Gemm) -> None:
    node.op = gemm.op_type
    node.attrs = gemm.attributes(layer=node.attrs["layer"], container=node.attrs["container"])
