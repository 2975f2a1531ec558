"""Attention as one operator, for ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from exporter.passes.surgery import CONTRIB_DOMAIN, array_of, is_output, only_consumer, producer
from exporter.targets import Target

_HEADS_FIRST = [0, 2, 1, 3]
_HEADS_FIRST_TURNED = [0, 2, 3, 1]
_TURNED = [0, 1, 3, 2]


@dataclass(frozen=True)
class _Heads:
    """Heads of an attention, times a factor: split from a tensor [B, T, H·D], or, where the graph goes on computing
    with the split heads, as a tensor [B, H, T, D] itself (`is_split`)."""

    tensor: gs.Tensor
    tokens: int
    heads: int
    width: int
    factor: float
    is_split: bool = False


@dataclass(frozen=True)
class _Attention:
    """What goes into one attention, and the node that writes its result [B, T, H·D]."""

    query: _Heads
    key: _Heads
    value: _Heads
    mask: gs.Tensor | None
    last: gs.Node


def fuse_attention(graph: gs.Graph, target: Target) -> int:
    """Split heads → (Q·c)·Kᵀ → [+ mask] → Softmax → ·V → merge heads ⇒ MultiHeadAttention(Q, K, V, mask).

    When Reshape and Transpose split and merge the heads, their sizes are known, and nothing else reads the scores or
    what becomes of them. Split queries and keys that are normalized or rotated first are merged again for the operator,
    which copies them once. ONNX Runtime computes the operator tile by tile and never writes all scores to memory,
    unless there is a mask; that must be one row for all queries, is widened once, and serves all blocks. Equal up to
    FP32 rounding. For ONNX Runtime; TensorRT fuses the parts itself.
    """
    if target.engine != "onnxruntime":
        return 0
    masks: dict[tuple[int, int], gs.Tensor] = {}
    fused = 0
    for softmax in [node for node in graph.nodes if node.op == "Softmax"]:
        attention = _match(graph, softmax)
        if attention is not None:
            _replace(graph, attention, masks)
            fused += 1
    if fused:
        graph.cleanup().toposort()
    return fused


def _match(graph: gs.Graph, softmax: gs.Node) -> _Attention | None:
    scores, mask = producer(softmax.inputs[0]), None
    if scores is not None and scores.op == "Add":
        mask, scores = scores.inputs[1], producer(scores.inputs[0])
    weighted = only_consumer(graph, softmax.outputs[0])
    if scores is None or scores.op != "MatMul" or only_consumer(graph, scores.outputs[0]) is None:
        return None
    if weighted is None or weighted.op != "MatMul" or weighted.inputs[0] is not softmax.outputs[0]:
        return None
    query, value = _heads(scores.inputs[0], _HEADS_FIRST), _heads(weighted.inputs[1], _HEADS_FIRST)
    key, last = _heads(scores.inputs[1], _HEADS_FIRST_TURNED), _last(graph, weighted)
    if query is None or key is None or value is None or last is None or softmax.attrs.get("axis", -1) not in (-1, 3):
        return None
    same_heads = query.heads == key.heads == value.heads and query.width == key.width
    # A product broadcasts a batch of one, the operator does not; batches of unknown size go by many names.
    batches = {
        size if isinstance(size, int) else None for size in (part.tensor.shape[0] for part in (query, key, value))
    }
    same_batch = len(batches) == 1
    if (
        not same_heads
        or not same_batch
        or key.tokens != value.tokens
        or value.factor != 1
        or not _is_row(mask, key.tokens)
    ):
        return None
    return _Attention(query, key, value, mask, last)


def _heads(tensor: gs.Tensor, permutation: list[int]) -> _Heads | None:
    """`tensor` as a factor times Transpose(Reshape(x [B, T, H·D], [.., T, H, D])), else times a [B, H, T, D]."""
    factor, node = 1.0, producer(tensor)
    while node is not None and node.op == "Mul":
        scalar = next((entry for entry in node.inputs if _is_scalar(entry)), None)
        if scalar is None:
            return None
        factor *= float(scalar.values.item())
        tensor = next(entry for entry in node.inputs if entry is not scalar)
        node = producer(tensor)
    return _from_whole(node, permutation, factor) or _from_split(tensor, permutation, factor)


def _from_whole(node: gs.Node | None, permutation: list[int], factor: float) -> _Heads | None:
    if node is None or node.op != "Transpose" or list(node.attrs.get("perm", [])) != permutation:
        return None
    split = producer(node.inputs[0])
    sizes = array_of(split.inputs[1]) if split is not None and split.op == "Reshape" else None
    if split is None or sizes is None or len(sizes) != 4 or any(int(size) <= 0 for size in sizes[1:]):
        return None
    tokens, heads, width = (int(size) for size in sizes[1:])
    whole = split.inputs[0]
    if whole.shape is None or list(whole.shape[1:]) != [tokens, heads * width]:
        return None
    return _Heads(whole, tokens, heads, width, factor)


def _from_split(tensor: gs.Tensor, permutation: list[int], factor: float) -> _Heads | None:
    """`tensor` [B, H, T, D] itself, or for keys what Transpose turned into [B, H, D, T]."""
    if permutation == _HEADS_FIRST_TURNED:
        node = producer(tensor)
        if node is None or node.op != "Transpose" or list(node.attrs.get("perm", [])) != _TURNED:
            return None
        tensor = node.inputs[0]
        whole = _from_whole(producer(tensor), _HEADS_FIRST, factor)
        if whole is not None:
            return whole
    if tensor.shape is None or len(tensor.shape) != 4 or not all(isinstance(size, int) for size in tensor.shape[1:]):
        return None
    heads, tokens, width = tensor.shape[1:]
    return _Heads(tensor, tokens, heads, width, factor, is_split=True)


def _is_scalar(tensor: gs.Tensor) -> bool:
    array = array_of(tensor)
    return array is not None and array.size == 1


def _is_row(mask: gs.Tensor | None, tokens: int) -> bool:
    """True for no mask, and for one [.., .., 1, tokens] that all queries share."""
    if mask is None:
        return True
    return mask.shape is not None and len(mask.shape) == 4 and list(mask.shape[2:]) == [1, tokens]


def _last(graph: gs.Graph, weighted: gs.Node) -> gs.Node | None:
    """The Reshape that merges the heads of `weighted`'s result, if it does just that."""
    turned = only_consumer(graph, weighted.outputs[0])
    if turned is None or turned.op != "Transpose" or list(turned.attrs.get("perm", [])) != _HEADS_FIRST:
        return None
    merged = only_consumer(graph, turned.outputs[0])
    if merged is None or merged.op != "Reshape" or is_output(graph, weighted.outputs[0]):
        return None
    before, sizes = turned.outputs[0].shape, array_of(merged.inputs[1])
    if before is None or sizes is None or not all(isinstance(size, int) for size in before[1:]):
        return None
    return merged if sizes.tolist()[1:] == [before[1], before[2] * before[3]] else None


def _replace(graph: gs.Graph, found: _Attention, masks: dict[tuple[int, int], gs.Tensor]) -> None:
    result = found.last.outputs[0]
    found.last.outputs.clear()
    inputs = [_merged(graph, part) for part in (found.query, found.key, found.value)]
    if found.mask is not None:
        none = gs.Variable.empty()
        inputs += [none, none, _widened(graph, found.mask, found.query.tokens, masks)]
    attributes = {"num_heads": found.query.heads, "scale": found.query.factor * found.key.factor}
    node = gs.Node("MultiHeadAttention", f"attention.{result.name}", attributes, inputs, [result])
    node.domain = CONTRIB_DOMAIN
    graph.nodes.append(node)


def _merged(graph: gs.Graph, part: _Heads) -> gs.Tensor:
    """The heads side by side, as the operator takes them: [B, T, H·D]."""
    if not part.is_split:
        return part.tensor
    name = f"{part.tensor.name}.merged"
    turned = gs.Variable(f"{name}.turned", part.tensor.dtype)
    merged = gs.Variable(name, part.tensor.dtype)
    sizes = gs.Constant(f"{name}.shape", np.array([-1, part.tokens, part.heads * part.width], np.int64))
    graph.nodes.append(gs.Node("Transpose", turned.name, {"perm": _HEADS_FIRST}, [part.tensor], [turned]))
    graph.nodes.append(gs.Node("Reshape", name, {}, [turned, sizes], [merged]))
    return merged


def _widened(graph: gs.Graph, mask: gs.Tensor, queries: int, masks: dict[tuple[int, int], gs.Tensor]) -> gs.Tensor:
    """The mask with a row for every query, which the operator asks for; one per mask and number of queries."""
    key = id(mask), queries
    if key not in masks:
        wide = gs.Variable(f"{mask.name}.wide{queries}", mask.dtype)
        shape = gs.Constant(f"{wide.name}.shape", np.array([1, 1, queries, 1], np.int64))
        graph.nodes.append(gs.Node("Expand", wide.name, {}, [mask, shape], [wide]))
        masks[key] = wide
    return masks[key]
