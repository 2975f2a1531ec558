"""Nodes that compute what they were given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import onnx_graphsurgeon as gs

from exporter.passes.surgery import array_of, bypass, element_type
from exporter.targets import Target


def drop_noops(graph: gs.Graph, target: Target) -> int:
    """Node(x) → x, when it is an Identity, or a Reshape, Expand, Transpose, Cast, Mul or Div that changes nothing.

    That is: to x's own shape, order or type, times or by one. A node that names a layer's or a block's tensor, or
    makes a graph output of an input, a constant or another output, stays.
    """
    changed = 0
    for node in list(graph.nodes):
        if node.domain or node.op not in _CHANGES_NOTHING or len(node.outputs) != 1:
            continue
        source = _CHANGES_NOTHING[node.op](node)
        changed += source is not None and bypass(graph, node, source)
    return changed


def _identity(node: gs.Node) -> gs.Tensor | None:
    return node.inputs[0]


def _reshape(node: gs.Node) -> gs.Tensor | None:
    """With at most one size left open, all others being equal, that one is equal as well."""
    x, wanted = node.inputs[0], array_of(node.inputs[1])
    if wanted is None or x.shape is None or len(wanted) != len(x.shape):
        return None
    copies = 0 if node.attrs.get("allowzero", 0) else 1
    known = [size for size in wanted.tolist() if size != -1]
    if len(known) < len(wanted) - 1:
        return None
    same = all(want in (-1, has) or (want == 0 and copies) for want, has in zip(wanted.tolist(), x.shape, strict=True))
    return x if same else None


def _expand(node: gs.Node) -> gs.Tensor | None:
    x, wanted = node.inputs[0], array_of(node.inputs[1])
    if wanted is None or x.shape is None or len(wanted) > len(x.shape):
        return None
    own = x.shape[len(x.shape) - len(wanted) :]
    return x if all(want in (1, has) for want, has in zip(wanted.tolist(), own, strict=True)) else None


def _transpose(node: gs.Node) -> gs.Tensor | None:
    perm = node.attrs.get("perm")
    return node.inputs[0] if perm is not None and list(perm) == list(range(len(perm))) else None


def _cast(node: gs.Node) -> gs.Tensor | None:
    return node.inputs[0] if element_type(node.inputs[0]) == node.attrs["to"] else None


def _times_one(node: gs.Node) -> gs.Tensor | None:
    first, second = node.inputs
    return next((x for x, factor in ((first, second), (second, first)) if _is_one(factor, x)), None)


def _by_one(node: gs.Node) -> gs.Tensor | None:
    x, divisor = node.inputs
    return x if _is_one(divisor, x) else None


def _is_one(factor: gs.Tensor, x: gs.Tensor) -> bool:
    """A single 1 that adds no axis to x."""
    array = array_of(factor)
    if array is None or array.size != 1 or x.shape is None or array.ndim > len(x.shape):
        return False
    return bool(np.all(array == 1))


_CHANGES_NOTHING: Mapping[str, Callable[[gs.Node], gs.Tensor | None]] = MappingProxyType(
    {
        "Identity": _identity,
        "Reshape": _reshape,
        "Expand": _expand,
        "Transpose": _transpose,
        "Cast": _cast,
        "Mul": _times_one,
        "Div": _by_one,
    }
)
