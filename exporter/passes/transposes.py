"""One Transpose for what the exporter writes as several nodes."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from exporter.passes.surgery import array_of, only_consumer, producer
from exporter.targets import Target

_BATCHED_SWAP = [0, 2, 1]


def merge_transposes(graph: gs.Graph, target: Target) -> int:
    """Several nodes that only reorder axes → one Transpose.

    Einsum("abc->acb", x) → Transpose(x), when it only permutes.
    Reshape to [-1, m, n] → Transpose(0, 2, 1) → Reshape to [..., n, m] → Transpose of the last two axes, when the
    leading sizes come back as they were.
    Transpose(Transpose(x)) → Transpose(x), when the inner one has no other reader.
    """
    changed = 0
    for node in graph.nodes:
        changed += _from_einsum(node)
    for node in list(graph.nodes):
        changed += _from_reshapes(graph, node)
    for node in list(graph.nodes):
        changed += _merge(graph, node)
    return changed


def _from_einsum(node: gs.Node) -> int:
    if node.op != "Einsum" or len(node.inputs) != 1:
        return 0
    source, arrow, result = node.attrs["equation"].replace(" ", "").partition("->")
    if not arrow or len(set(source)) != len(source) or sorted(source) != sorted(result) or not source.isalpha():
        return 0
    node.op, node.attrs = "Transpose", {"perm": [source.index(axis) for axis in result]}
    return 1


def _from_reshapes(graph: gs.Graph, last: gs.Node) -> int:
    swap = _before(graph, last, "Reshape", "Transpose")
    first = None if swap is None else _before(graph, swap, "Transpose", "Reshape")
    if swap is None or first is None or swap.attrs.get("perm") != _BATCHED_SWAP:
        return 0
    x, merged, result = first.inputs[0], array_of(first.inputs[1]), array_of(last.inputs[1])
    if x.shape is None or merged is None or result is None or len(x.shape) != len(result):
        return 0
    *leading, rows, columns = x.shape
    if [*merged[-2:]] != [rows, columns] or len(merged) != len(_BATCHED_SWAP) or [*result[-2:]] != [columns, rows]:
        return 0
    given = result[:-2].tolist()
    unknown = [index for index, size in enumerate(given) if size != leading[index]]
    # One leading size may be left open: the others being equal, it is equal as well.
    if len(unknown) > 1 or any(given[index] != -1 for index in unknown):
        return 0
    axes = len(x.shape)
    last.op, last.attrs = "Transpose", {"perm": [*range(axes - 2), axes - 1, axes - 2]}
    for dead in (first, swap):
        dead.inputs.clear()
    last.inputs = [x]
    last.outputs[0].shape = [*leading, columns, rows]
    return 1


def _merge(graph: gs.Graph, outer: gs.Node) -> int:
    inner = _before(graph, outer, "Transpose", "Transpose")
    if inner is None or "perm" not in inner.attrs or "perm" not in outer.attrs:
        return 0
    outer.attrs["perm"] = [inner.attrs["perm"][axis] for axis in outer.attrs["perm"]]
    source = inner.inputs[0]
    inner.inputs.clear()
    outer.inputs = [source]
    return 1


def _before(graph: gs.Graph, node: gs.Node, op: str, wanted: str) -> gs.Node | None:
    """The `wanted` operator that alone feeds `node`, an `op`, and feeds nothing else."""
    if node.op != op or not node.inputs:
        return None
    found = producer(node.inputs[0])
    alone = found is not None and found.op == wanted and only_consumer(graph, node.inputs[0]) is node
    return found if alone else None
