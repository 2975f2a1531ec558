"""The rounding of FP16 and BF16 tensors, in FP32, for ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.passes.surgery import element_type, has_given_name
from exporter.targets import Target

_LOW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

# Their results are numbers that were rounded before.
_MOVES = frozenset(
    {"Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)


def round_to_compute_type(graph: gs.Graph, target: Target) -> int:
    """FLOAT16 or BFLOAT16 tensor → FLOAT tensor behind Cast to the type and Cast back, wherever one is computed.

    ONNX Runtime's CPU lacks kernels for these types, and where it has them it may keep FP32 between two operators;
    so here every operator computes in FP32 and its result is rounded as the engine stores it. Constants become FLOAT
    with the same values, operators that only move numbers round nothing, and Casts back to FLOAT stay, since layers are
    found by their results. A tensor between two Casts that stand back to back is such a rounding already, unless it is
    a block's or a layer's by its name: the gate reads that one, and NumPy has no BF16 that ONNX Runtime would give.
    """
    changed = 0
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        changed += _widen_constants(node)
        nodes.append(node)
        low = [tensor for tensor in node.outputs if element_type(tensor) in _LOW and not _is_rounding(tensor)]
        for tensor in low:
            nodes += _round(node, tensor)
        changed += bool(low)
    graph.nodes = nodes
    return changed


def _is_rounding(tensor: gs.Tensor) -> bool:
    """Whether the tensor lies between two Casts that stand back to back, has no other reader, and no given name."""
    if has_given_name(tensor.name):
        return False
    casts = [*tensor.inputs, *tensor.outputs]
    return len(casts) == 2 and len(tensor.outputs) == 1 and all(node.op == "Cast" for node in casts)


def _widen_constants(node: gs.Node) -> int:
    low = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant) and element_type(tensor) in _LOW]
    for tensor in low:
        tensor.values = np.asarray(tensor.values).astype(np.float32)
    return len(low)


def _round(node: gs.Node, tensor: gs.Tensor) -> list[gs.Node]:
    """The Casts that make `tensor`, FLOAT from here on, out of what `node` computes; none for a mere move."""
    onnx_type, dtype = element_type(tensor), tensor.dtype
    tensor.dtype = np.dtype(np.float32)
    if node.op in _MOVES:
        return []
    rounded = gs.Variable(f"{tensor.name}.rounded", dtype, tensor.shape)
    back = gs.Node("Cast", f"{tensor.name}.widen", {"to": TensorProto.FLOAT}, [rounded])
    if node.op == "Cast":
        node.outputs = [rounded]
        back.outputs = [tensor]
        return [back]
    exact = gs.Variable(f"{tensor.name}.exact", np.dtype(np.float32), tensor.shape)
    node.outputs = [exact if output is tensor else output for output in node.outputs]
    back.outputs = [tensor]
    return [gs.Node("Cast", f"{tensor.name}.round", {"to": onnx_type}, [exact], [rounded]), back]
