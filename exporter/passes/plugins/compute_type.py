"""FP16 and BF16 at the plugins' doors: their kernels convert numbers as they load and store them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from exporter.compute import COMPUTE_TYPES, ComputeType
from exporter.passes.compute_type import typed_constant
from exporter.passes.plugins.kernel_nodes import kernel_of
from exporter.passes.surgery import array_of, element_type, is_output, producer
from exporter.targets import Target


def plugins_in_fp16(graph: gs.Graph, target: Target) -> int:
    """Cast(FLOAT16) → plugin of FLOAT → Cast to FLOAT16 ⇒ plugin of FLOAT16.

    All that a plugin reads or writes in its float type is FLOAT16 then: casts around it go, what is FLOAT otherwise
    gets one. Token scales, weight scales and bias stay FLOAT. After `compute_in_fp16`, which leaves plugins FLOAT.
    """
    return _Doors(graph, COMPUTE_TYPES["fp16"]).convert()


def plugins_in_bf16(graph: gs.Graph, target: Target) -> int:
    """Cast(BFLOAT16) → plugin of FLOAT → Cast to BFLOAT16 ⇒ plugin of BFLOAT16, as `plugins_in_fp16`."""
    return _Doors(graph, COMPUTE_TYPES["bf16"]).convert()


@dataclass
class _Doors:
    """One walk over a graph; `nodes` are those passed so far, and `low` what FLOAT tensors are in the type, by id."""

    graph: gs.Graph
    compute: ComputeType
    nodes: list[gs.Node] = field(default_factory=list)
    low: dict[int, gs.Tensor] = field(default_factory=dict)

    @property
    def onnx_type(self) -> int:
        return int(helper.np_dtype_to_tensor_dtype(self.compute.dtype))

    def convert(self) -> int:
        """How many plugins changed their type."""
        changed = 0
        for node in list(self.graph.nodes):
            variant = kernel_of(node)
            if variant is None or variant.float_type == self.compute.name:
                self.nodes.append(node)
                continue
            converted = replace(variant, float_type=self.compute.name)
            node.op = converted.op_type
            for index, name in enumerate(variant.input_names):
                if variant.input_types[name] != converted.input_types[name]:
                    node.inputs[index] = self._in_type(node.inputs[index])
            self.nodes.append(node)
            for index, name in enumerate(variant.output_names):
                if variant.output_types[name] != converted.output_types[name]:
                    self._make_in_type(node, index)
            changed += 1
        self.graph.nodes = self.nodes
        return changed

    def _in_type(self, tensor: gs.Tensor) -> gs.Tensor:
        """The tensor in the type: what was cast to make it, or itself cast."""
        if element_type(tensor) == self.onnx_type:
            return tensor
        if id(tensor) not in self.low:
            self.low[id(tensor)] = self._cast_down(tensor)
        return self.low[id(tensor)]

    def _cast_down(self, tensor: gs.Tensor) -> gs.Tensor:
        array, maker, name = array_of(tensor), producer(tensor), f"{tensor.name}.{self.compute.name}"
        if array is not None:
            return typed_constant(name, np.asarray(array).astype(self.compute.dtype))
        if maker is not None and maker.op == "Cast" and element_type(maker.inputs[0]) == self.onnx_type:
            return maker.inputs[0]
        low = gs.Variable(name, self.compute.dtype, tensor.shape)
        self.nodes.append(gs.Node("Cast", f"{name}.cast", {"to": self.onnx_type}, [tensor], [low]))
        return low

    def _make_in_type(self, node: gs.Node, index: int) -> None:
        """Let the node write the type; readers that want FLOAT read it through one Cast."""
        made = node.outputs[index]
        if is_output(self.graph, made):
            low, wide = gs.Variable(f"{made.name}.{self.compute.name}", self.compute.dtype, made.shape), made
            node.outputs[index] = low
        else:
            low, wide = made, gs.Variable(f"{made.name}.fp32", np.dtype(np.float32), made.shape)
            low.dtype = self.compute.dtype
        self.low[id(wide)] = low
        for reader in list(made.outputs):
            if reader.op == "Cast" and reader.attrs["to"] == self.onnx_type:
                for beyond in list(reader.outputs[0].outputs):
                    _redirect(beyond, reader.outputs[0], low)
                reader.inputs.clear()
                reader.outputs.clear()
            else:
                _redirect(reader, made, low if kernel_of(reader) else wide)
        if wide.outputs or is_output(self.graph, wide):
            attributes = {"to": TensorProto.FLOAT}
            self.nodes.append(gs.Node("Cast", f"{wide.name}.cast", attributes, [low], [wide]))


def _redirect(reader: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    for index, tensor in enumerate(reader.inputs):
        if tensor is old:
            reader.inputs[index] = new
