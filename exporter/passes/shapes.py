"""Shapes that the graph computes although they are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from exporter.passes.surgery import array_of, producer
from exporter.targets import Target

Sizes: TypeAlias = list[int | str]


def fold_shapes(graph: gs.Graph, target: Target) -> int:
    """Reshape(x, Concat(Slice(Shape(y)), …)) → Reshape(x, constant), when at most one of the sizes is unknown.

    The unknown one, the batch, becomes -1. The arithmetic may be Shape, Slice, Gather, Concat, Squeeze and Unsqueeze.
    """
    changed = 0
    for node in graph.nodes:
        if node.op != "Reshape" or array_of(node.inputs[1]) is not None:
            continue
        sizes = _sizes(node.inputs[1])
        if sizes is None or sum(not _is_known(size) for size in sizes) > 1:
            continue
        constant = np.array([size if _is_known(size) else -1 for size in sizes], np.int64)
        node.inputs[1] = gs.Constant(f"{node.outputs[0].name}.shape", constant)
        node.attrs["allowzero"] = 0
        node.outputs[0].shape = [size if _is_known(size) else f"{node.outputs[0].name}.batch" for size in sizes]
        changed += 1
    return changed


def _is_known(size: int | str) -> bool:
    return isinstance(size, int) and size > 0


def _sizes(tensor: gs.Tensor) -> Sizes | None:
    """The elements of a one-dimensional (or scalar) integer tensor: numbers, or the names of dynamic dimensions."""
    constant = array_of(tensor)
    if constant is not None:
        return [int(size) for size in constant.ravel()] if constant.dtype == np.int64 else None
    node = producer(tensor)
    if node is None or node.domain or node.op not in _ARITHMETIC:
        return None
    return _ARITHMETIC[node.op](node)


def _shape(node: gs.Node) -> Sizes | None:
    shape = node.inputs[0].shape
    if shape is None or any(size is None or size == "" for size in shape):
        return None
    end = node.attrs.get("end", len(shape))
    return list(shape)[node.attrs.get("start", 0) : end]


def _slice(node: gs.Node) -> Sizes | None:
    sizes, bounds = _sizes(node.inputs[0]), [array_of(tensor) for tensor in node.inputs[1:]]
    if sizes is None or any(bound is None or bound.size != 1 for bound in bounds):
        return None
    start, end, axis, step = [int(bound.item()) for bound in bounds if bound is not None] + [0, 1][len(bounds) - 2 :]
    return sizes[start:end:step] if axis in (0, -1) and step > 0 else None


def _gather(node: gs.Node) -> Sizes | None:
    sizes, indices = _sizes(node.inputs[0]), array_of(node.inputs[1])
    if sizes is None or indices is None or indices.ndim > 1:
        return None
    wanted = [int(index) for index in indices.ravel()]
    return [sizes[index] for index in wanted] if all(-len(sizes) <= index < len(sizes) for index in wanted) else None


def _concat(node: gs.Node) -> Sizes | None:
    parts = [_sizes(tensor) for tensor in node.inputs]
    return None if any(part is None for part in parts) else [size for part in parts if part for size in part]


def _same(node: gs.Node) -> Sizes | None:
    return _sizes(node.inputs[0])


_ARITHMETIC: Mapping[str, Callable[[gs.Node], Sizes | None]] = MappingProxyType(
    {"Shape": _shape, "Slice": _slice, "Gather": _gather, "Concat": _concat, "Squeeze": _same, "Unsqueeze": _same}
)
