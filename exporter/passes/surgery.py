"""What every pass asks of an onnx-graphsurgeon graph: constants, single consumers, replacing, splicing new nodes in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from plugins.body import Body
from plugins.op import OnlineQuantize, QuantizeBlocks, is_ours

CONTRIB_DOMAIN = "com.microsoft"
"""The domain of ONNX Runtime's own operators, which every build of it has."""

# The names that the passes and the boundary markers give, which nothing renames afterwards.
_GIVEN = re.compile(r"blocks\.\w+|.+\.(input|output|values|token_scales)")

V_co = TypeVar("V_co", covariant=True)


class _Kind(Protocol[V_co]):
    def parse(self, op_type: str) -> V_co | None: ...


def variant_of(node: gs.Node, kind: _Kind[V_co]) -> V_co | None:
    """The node's variant of the operator `kind` (a class of `plugins.op.VARIANTS`), None if it is another operator."""
    return kind.parse(node.op) if is_ours(node) else None


def online_quantizer(node: gs.Node | None) -> OnlineQuantize | QuantizeBlocks | None:
    """The node's variant if it quantizes activations online, per token or in blocks."""
    if node is None:
        return None
    return variant_of(node, OnlineQuantize) or variant_of(node, QuantizeBlocks)


def array_of(tensor: gs.Tensor) -> npt.NDArray[Any] | None:
    """The values of a constant tensor, None for any other."""
    return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else None


def element_type(tensor: gs.Tensor) -> int:
    """The tensor's ONNX element type, UNDEFINED where inference did not find one."""
    # An ONNX number already where numpy has no such type.
    if tensor.dtype is None or isinstance(tensor.dtype, int):
        return tensor.dtype or onnx.TensorProto.UNDEFINED
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes the tensor, None for constants and graph inputs."""
    return tensor.inputs[0] if tensor.inputs else None


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """True if the tensor is one of the graph's outputs."""
    return any(output is tensor for output in graph.outputs)


def only_consumer(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The node that alone reads the tensor, once; None if there are more, or it is a graph output."""
    if len(tensor.outputs) != 1 or is_output(graph, tensor):
        return None
    return tensor.outputs[0]


def replace_uses(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every reader of `old` read `new`; if `old` is a graph output, `new` becomes it and takes its name."""
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
    if is_output(graph, old):
        new.name, old.name = old.name, f"{old.name}.replaced"
        new.dtype, new.shape = old.dtype, old.shape
        graph.outputs = [new if output is old else output for output in graph.outputs]


def can_take_over(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> bool:
    """Whether `replace_uses` may be called: only a computed tensor that is no output yet can become an output."""
    return not is_output(graph, old) or (bool(new.inputs) and not is_output(graph, new))


def bypass(graph: gs.Graph, node: gs.Node, source: gs.Tensor) -> bool:
    """Let the readers of the node's one output read `source`, which equals it; True if that was done.

    Not where the output names a layer's or a block's tensor, or `source` cannot take its place as a graph output.
    """
    output = node.outputs[0]
    if has_given_name(output.name) or not can_take_over(graph, output, source):
        return False
    node.outputs.clear()
    replace_uses(graph, output, source)
    return True


def give_name(graph: gs.Graph, tensor: gs.Tensor, name: str) -> bool:
    """Name a computed tensor, unless it is a graph input or output or has been given a name before; True if named."""
    taken = has_given_name(tensor.name) or is_output(graph, tensor) or not tensor.inputs
    if taken:
        return False
    tensor.name = name
    return True


def has_given_name(name: str) -> bool:
    """True for a name by which a layer's or a block's tensor is found again."""
    return _GIVEN.fullmatch(name) is not None


def digest(array: npt.NDArray[Any]) -> str:
    """A short name for the array's content."""
    facts = f"{array.dtype}{list(array.shape)}".encode()
    return hashlib.sha256(facts + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


class Splicer:
    """Turns the nodes of a `Body` into nodes of a graph; equal constants become one initializer."""

    def __init__(self) -> None:
        self._constants: dict[str, gs.Constant] = {}

    def constant(self, array: npt.NDArray[Any]) -> gs.Constant:
        """The one initializer with this content."""
        return self.shared(gs.Constant(f"constant.{digest(array)}", array))

    def __contains__(self, name: str) -> bool:
        """True if an initializer of this name has been made."""
        return name in self._constants

    def shared(self, constant: gs.Constant) -> gs.Constant:
        """The one initializer with this name."""
        return self._constants.setdefault(constant.name, constant)

    def nodes(self, body: Body, tensors: Mapping[str, gs.Tensor]) -> list[gs.Node]:
        """The body's nodes, connected to the graph's `tensors` under the names that the body calls them by."""
        known: dict[str, gs.Tensor] = dict(tensors)
        nodes = []
        for proto in body.nodes:
            if proto.op_type == "Constant":
                known[proto.output[0]] = self.constant(numpy_helper.to_array(proto.attribute[0].t))
                continue
            inputs = [known[name] if name in known else self._constants[name] for name in proto.input]
            outputs = [known.setdefault(name, gs.Variable(name)) for name in proto.output]
            attributes = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
            domain = proto.domain or None
            nodes.append(gs.Node(proto.op_type, outputs[0].name, attributes, inputs, outputs, domain=domain))
        return nodes


def low_bit_constant(name: str, array: npt.NDArray[Any], onnx_type: int) -> gs.Constant:
    """An initializer of a type that numpy lacks.

    FLOAT8E4M3FN (`array` holds its bytes), INT4 (int8 values), UINT4 or FLOAT4E2M1 (codes).
    """
    if onnx_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1):
        nibbles = np.pad(array.astype(np.uint8).ravel() & 0xF, (0, array.size % 2))
        raw = (nibbles[0::2] | nibbles[1::2] << 4).tobytes()
    else:
        raw = np.ascontiguousarray(array).tobytes()
    return gs.Constant(name, LazyValues(helper.make_tensor(name, onnx_type, array.shape, raw, raw=True)))
