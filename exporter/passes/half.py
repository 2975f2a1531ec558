"""Constants that half the bytes hold as well."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from exporter.passes.surgery import is_output
from exporter.targets import Target
from plugins.op import is_ours

SMALLEST_BYTES = 1024
"""Smaller constants stay: a Cast node would cost more than it saves."""


def store_exactly_in_half(graph: gs.Graph, target: Target) -> int:
    """FLOAT constant → FLOAT16 constant and Cast to FLOAT, when no value changes and it has at least 1 KiB.

    For ONNX Runtime, which folds the Cast when it loads the file; an engine stores its own constants. What the
    project's own operators read stays, because lowering looks at it.
    """
    if target.engine != "onnxruntime":
        return 0
    casts = []
    for tensor in list(graph.tensors().values()):
        if not isinstance(tensor, gs.Constant) or tensor.dtype != np.float32:
            continue
        if is_output(graph, tensor) or any(is_ours(node) for node in tensor.outputs):
            continue
        array: npt.NDArray[np.float32] = tensor.values
        if array.nbytes < SMALLEST_BYTES:
            continue
        with np.errstate(over="ignore"):
            halves = array.astype(np.float16)
        if not np.array_equal(halves.astype(np.float32).view(np.int32), array.view(np.int32)):
            continue
        full = gs.Variable(f"{tensor.name}.full", np.float32, array.shape)
        for node in list(tensor.outputs):
            for index, source in enumerate(node.inputs):
                if source is tensor:
                    node.inputs[index] = full
        half = gs.Constant(f"{tensor.name}.half", halves)
        casts.append(gs.Node("Cast", f"{tensor.name}.cast", {"to": onnx.TensorProto.FLOAT}, [half], [full]))
    graph.nodes = [*casts, *graph.nodes]
    return len(casts)
