"""Attention as few nodes: its scale in one place, its mask left to broadcast."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from exporter.passes.surgery import array_of, is_output, only_consumer, producer, replace_uses
from exporter.targets import Target

_BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div"})


def fold_attention_scale(graph: gs.Graph, target: Target) -> int:
    """MatMul(Mul(a, s), Mul(b, t)) → MatMul(Mul(a, s·t), b), or the same on b, whichever has fewer numbers.

    When s and t are constants of one element and the scaled tensors have no other reader. Scaling before the product
    keeps FP16 scores small. Equal up to FP32 rounding.
    """
    folded = 0
    for node in graph.nodes:
        if node.op != "MatMul":
            continue
        first, second = (_scaled(graph, tensor, node) for tensor in node.inputs)
        if first is None or second is None:
            continue
        kept, dropped, position = (second, first, 0) if _smaller(second, first) else (first, second, 1)
        product = np.float64(_factor(kept)) * np.float64(_factor(dropped))
        kept.inputs = [_operand(kept), gs.Constant(f"{kept.name}.scale", np.asarray(product, np.float32))]
        node.inputs[position] = _operand(dropped)
        folded += 1
    return folded


def drop_broadcast_expands(graph: gs.Graph, target: Target) -> int:
    """Expand(x, constant) → x, when all its readers are element by element and broadcast x to the same result.

    That is: the other operand has every axis that Expand would widen at its full size.
    """
    changed = 0
    for node in list(graph.nodes):
        if node.op != "Expand" or not node.outputs or not node.outputs[0].outputs:
            continue
        x, wide = node.inputs[0], node.outputs[0]
        sizes = array_of(node.inputs[1])
        if x.shape is None or sizes is None or len(sizes) > len(x.shape) or is_output(graph, wide):
            continue
        if all(_broadcasts(reader, wide, sizes.tolist()) for reader in wide.outputs):
            node.outputs.clear()
            replace_uses(graph, wide, x)
            changed += 1
    return changed


def _scaled(graph: gs.Graph, tensor: gs.Tensor, reader: gs.Node) -> gs.Node | None:
    """The Mul by a single constant that makes `tensor` for `reader` alone."""
    node = producer(tensor)
    if node is None or node.op != "Mul" or only_consumer(graph, tensor) is not reader:
        return None
    constants = [operand for operand in node.inputs if array_of(operand) is not None]
    single = len(constants) == 1 and constants[0].values.size == 1 and constants[0].values.ndim <= 1
    return node if single and constants[0].dtype == np.float32 else None


def _factor(node: gs.Node) -> float:
    return float(next(tensor.values.item() for tensor in node.inputs if isinstance(tensor, gs.Constant)))


def _operand(node: gs.Node) -> gs.Tensor:
    return next(tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant))


def _smaller(first: gs.Node, second: gs.Node) -> bool:
    """Whether `first` scales fewer numbers, as far as sizes are known."""
    counts = []
    for node in (first, second):
        shape = _operand(node).shape
        if shape is None:
            return False
        counts.append(math.prod(size for size in shape if isinstance(size, int)))
    return counts[0] < counts[1]


def _broadcasts(reader: gs.Node, wide: gs.Tensor, sizes: list[int]) -> bool:
    others = [tensor for tensor in reader.inputs if tensor is not wide]
    if reader.op not in _BROADCASTING or len(others) != 1 or others[0].shape is None:
        return False
    shape = list(others[0].shape)
    if len(shape) < len(wide.shape or sizes):
        return False
    return all(size in (1, has) for size, has in zip(reversed(sizes), reversed(shape), strict=False))
