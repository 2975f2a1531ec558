"""How much memory a build and an engine will take, from the graph alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from exporter.device.sizes import size

_BITS: Mapping[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.DOUBLE: 64,
    TensorProto.INT64: 64,
    TensorProto.INT32: 32,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.BOOL: 8,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.FLOAT8E8M0: 8,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of device memory that an engine needs, as the graph says before it is built.

    `weights`: every constant in its stored type. `activations`: the most that is alive at once, node after node and
    nothing fused, at the largest batch `batch`. `workspace`: the limit that was set, None where TensorRT may take what
    is free. `unknown`: tensors of unknown size, which are left out.
    """

    weights: int
    activations: int
    workspace: int | None
    batch: int
    unknown: int

    @property
    def total(self) -> int:
        """Weights, activations and the limit of the workspace."""
        return self.weights + self.activations + (self.workspace or 0)

    def sentence(self, free: int | None) -> str:
        """The estimate, what it is based on, and what it is held against."""
        workspace = "as much workspace as is free" if self.workspace is None else f"workspace {size(self.workspace)}"
        left_out = f", {self.unknown} tensors of unknown size left out" if self.unknown else ""
        against = "free memory unknown" if free is None else f"{size(free)} free"
        return (
            f"memory: weights {size(self.weights)}, activations up to {size(self.activations)} at batch {self.batch} "
            f"(the graph's own tensors, nothing fused{left_out}), {workspace}; {against}"
        )


def estimate_memory(model: onnx.ModelProto, batch: int, workspace: int | None) -> MemoryEstimate:
    """Weights and the largest set of activations alive at once, dynamic dimensions being `batch`."""
    weights = sum(_bytes(tensor.data_type, tensor.dims) for tensor in model.graph.initializer)
    sizes: dict[str, int] = {}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        kind = value.type.tensor_type
        if kind.elem_type and kind.HasField("shape"):
            dims = [entry.dim_value if entry.HasField("dim_value") else batch for entry in kind.shape.dim]
            sizes[value.name] = _bytes(kind.elem_type, dims)
    constants = {tensor.name for tensor in model.graph.initializer}
    made = {name for node in model.graph.node for name in node.output if name}
    unknown = len(made - sizes.keys())
    return MemoryEstimate(weights, _peak(model.graph, sizes, constants), workspace, batch, unknown)


def _bytes(element_type: int, dims: Iterable[int]) -> int:
    return -(-math.prod(dims) * _BITS.get(element_type, 32) // 8)


def _peak(graph: onnx.GraphProto, sizes: Mapping[str, int], constants: set[str]) -> int:
    """The most bytes alive between two nodes, every tensor from the node that makes it to the last that reads it."""
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    last |= {value.name: len(graph.node) for value in graph.output}
    alive = {value.name for value in graph.input} - constants
    peak = 0
    for index, node in enumerate(graph.node):
        alive |= {name for name in node.output if name}
        peak = max(peak, sum(sizes.get(name, 0) for name in alive))
        alive -= {name for name in (*node.input, *node.output) if last.get(name, index) <= index}
    return peak
