"""What the fusions look for: plain norms, tanh-GELU, rows that serve a whole sample, tensors that nobody else needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from exporter.passes.surgery import array_of, has_given_name, only_consumer, producer

_EPSILON = np.float32(1e-6)
_STANDARD = (None, "", "ai.onnx")


@dataclass(frozen=True)
class Norm:
    """LayerNormalization of `x` [B, T, K] over K, times `scale`, plus `shift`: constants [K], None for 1 and 0."""

    x: gs.Tensor
    scale: gs.Constant | None
    shift: gs.Constant | None


def is_hidden(graph: gs.Graph, tensor: gs.Tensor, reader: gs.Node, own_name: str = "") -> bool:
    """Whether the tensor may become internal to a kernel: only `reader` reads it, once, and it is no block's or layer's
    by its name, unless it is called `own_name`, which the gate finds inside the kernel."""
    named = has_given_name(tensor.name) and tensor.name != own_name
    return not named and only_consumer(graph, tensor) is reader


def operands(node: gs.Node | None, op: str) -> list[tuple[gs.Tensor, gs.Tensor]]:
    """The two inputs of a standard `op` that commutes, in both orders; nothing for another node."""
    if node is None or node.op != op or node.domain not in _STANDARD or len(node.inputs) != 2:
        return []
    first, second = node.inputs
    return [(first, second), (second, first)]


def norm_of(node: gs.Node | None) -> Norm | None:
    """The node as a norm with the kernels' epsilon over the last of three axes, if it is one with constant weights."""
    if node is None or node.op != "LayerNormalization" or node.domain not in _STANDARD or len(node.outputs) != 1:
        return None
    x = node.inputs[0]
    rank = 0 if x.shape is None else len(x.shape)
    over_last = node.attrs.get("axis", -1) in (-1, rank - 1)
    if rank != 3 or not over_last or np.float32(node.attrs.get("epsilon", 1e-5)) != _EPSILON:
        return None
    weights = node.inputs[1:]
    arrays = [array for array in map(array_of, weights) if array is not None]
    if len(arrays) != len(weights):
        return None
    scale = None if (arrays[0] == 1).all() else weights[0]
    shift = weights[1] if len(weights) > 1 and arrays[1].any() else None
    return Norm(x, scale, shift)


def is_tanh_gelu(node: gs.Node | None) -> bool:
    """Whether the node is a Gelu by its tanh approximation."""
    if node is None or node.op != "Gelu" or node.domain not in _STANDARD:
        return False
    return bool(node.attrs.get("approximate", "none") == "tanh")


def is_row_per_sample(tensor: gs.Tensor, channels: int) -> bool:
    """Whether the tensor is [B or 1, 1, channels]."""
    shape = tensor.shape
    return shape is not None and len(shape) == 3 and list(shape[1:]) == [1, channels]


def same_shape(first: gs.Tensor, second: gs.Tensor) -> bool:
    """Whether both are [B, T, N] with equal T and N; a batch of one is another shape than a batch of any size."""
    if first.shape is None or second.shape is None or len(first.shape) != 3 or len(second.shape) != 3:
        return False
    batches = [shape[0] if isinstance(shape[0], int) else None for shape in (first.shape, second.shape)]
    return batches[0] == batches[1] and list(first.shape[1:]) == list(second.shape[1:])


def serves_all_samples(tensor: gs.Tensor) -> bool:
    """Whether a row per sample is one row for all of them."""
    return bool(tensor.shape[0] == 1)


def made_by(tensor: gs.Tensor, graph: gs.Graph, reader: gs.Node) -> gs.Node | None:
    """The node that makes the tensor, if it may become internal to `reader`'s kernel."""
    return producer(tensor) if is_hidden(graph, tensor, reader) else None
