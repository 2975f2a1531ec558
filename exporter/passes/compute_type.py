"""FP16 and BF16 for everything that is not a quantized linear."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from exporter.compute import COMPUTE_TYPES, ComputeType, wider_than
from exporter.errors import InputError
from exporter.passes.half_products import probe_products
from exporter.passes.surgery import array_of, element_type, is_output, low_bit_constant
from exporter.targets import Target
from plugins.op import is_ours

AMAX_PREFIX = "amax:"

_LINEAR = frozenset({"MatMul", "Gemm", "Conv"})
_SINUSOID = frozenset({"Sin", "Cos"})
# They sum squares, which overflow FP16, and a strongly typed engine has no other place to say in what.
_NORMALIZATION = frozenset(
    {"GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization", "RMSNormalization"}
)


def compute_in_fp16(graph: gs.Graph, target: Target) -> int:
    """FLOAT tensors → FLOAT16 tensors, between the quantized linears and before and after them.

    FloatQuantizeOnline and FloatGemm keep reading and writing FLOAT, with one Cast at the entry, shared by all
    quantizers of a tensor, and one at the exit; so the lowering after this pass is the same as without it. Sinusoids
    of the timestep stay FLOAT up to the first linear; normalizations stay FLOAT between two Casts, and so do operators
    that the ONNX standard does not define on the type, and the graph's inputs and outputs. A graph that has such
    tensors already is left alone. Raises `InputError` naming a constant that the type cannot hold.
    """
    return _lower(graph, COMPUTE_TYPES["fp16"], target)


def compute_in_bf16(graph: gs.Graph, target: Target) -> int:
    """FLOAT tensors → BFLOAT16 tensors, exactly where `compute_in_fp16` has FLOAT16 tensors."""
    return _lower(graph, COMPUTE_TYPES["bf16"], target)


def probe_amax(graph: gs.Graph, target: Target) -> int:
    """x → ReduceMax(Abs(x)), a scalar output called "amax:<x>", for every tensor that compute types would store.

    Also for the products that a target without FP32 products will round to FP16 (`probe_products`). These outputs
    replace the graph's own, so that no large tensor outlives its readers.
    """
    stored = [*stored_tensors(graph, COMPUTE_TYPES["fp16"]), *probe_products(graph, target)]
    outputs = []
    for tensor in stored:
        magnitude, amax = (
            gs.Variable(f"{tensor.name}.magnitude"),
            gs.Variable(AMAX_PREFIX + tensor.name, np.float32, ()),
        )
        graph.nodes.append(gs.Node("Abs", f"{tensor.name}.abs", {}, [tensor], [magnitude]))
        graph.nodes.append(gs.Node("ReduceMax", f"{tensor.name}.amax", {"keepdims": 0}, [magnitude], [amax]))
        outputs.append(amax)
    graph.outputs = outputs
    return len(outputs)


def stored_tensors(graph: gs.Graph, compute: ComputeType) -> list[gs.Variable]:
    """The FLOAT tensors, constants aside, that would be stored in the compute type, in the graph's order."""
    chosen = {id(node) for node in _lowered_nodes(graph, compute)}
    tensors = [*graph.inputs, *(tensor for node in graph.nodes for tensor in node.outputs)]
    return [
        tensor
        for tensor in tensors
        if _is_float(tensor) and any(id(node) in chosen for node in (*tensor.inputs, *tensor.outputs))
    ]


def _is_float(tensor: gs.Tensor) -> bool:
    return element_type(tensor) == TensorProto.FLOAT


def _lower(graph: gs.Graph, compute: ComputeType, target: Target) -> int:
    """Returns how many nodes compute in the type."""
    onnx_type = helper.np_dtype_to_tensor_dtype(compute.dtype)
    types = {name: element_type(tensor) for name, tensor in graph.tensors().items()}
    if onnx_type in types.values():
        return 0
    unknown = next((name for name, found in types.items() if found == TensorProto.UNDEFINED), None)
    if unknown is not None:
        raise ValueError(f"the type of tensor {unknown!r} is not known; run this pass first on a graph that is valid")
    lowered = _lowered_nodes(graph, compute)
    chosen = {id(node) for node in lowered}
    _store_constants(lowered, chosen, compute, wider_than(compute.name, target))
    nodes = [cast for tensor in graph.inputs for cast in _cast_for_readers(graph, tensor, chosen, compute)]
    for node in graph.nodes:
        outputs = [tensor for tensor in node.outputs if _is_float(tensor)]
        nodes.append(node)
        nodes += [cast for tensor in outputs for cast in _cast_for_readers(graph, tensor, chosen, compute)]
    graph.nodes = nodes
    return len(lowered)


def _lowered_nodes(graph: gs.Graph, compute: ComputeType) -> list[gs.Node]:
    onnx_type = helper.np_dtype_to_tensor_dtype(compute.dtype)
    kept = _sinusoids(graph)
    return [
        node
        for node in graph.nodes
        if id(node) not in kept
        and not is_ours(node)
        and node.op != "Cast"
        and node.op not in _NORMALIZATION
        and any(_is_float(tensor) for tensor in node.inputs)
        and _defined_on(node, graph.opset, onnx_type)
    ]


def _sinusoids(graph: gs.Graph) -> set[int]:
    """Sines and cosines, all that they are computed from, and what is made of them up to the first linear."""
    kept: set[int] = set()
    for node in reversed(graph.nodes):
        if node.op in _SINUSOID or any(id(reader) in kept for tensor in node.outputs for reader in tensor.outputs):
            kept.add(id(node))
    for node in graph.nodes:
        follows = any(id(maker) in kept for tensor in node.inputs for maker in tensor.inputs)
        if follows and node.op not in _LINEAR and not is_ours(node):
            kept.add(id(node))
    return kept


def _defined_on(node: gs.Node, opset: int, onnx_type: int) -> bool:
    """Whether the standard defines the operator with the type in place of FLOAT, on every FLOAT input and output."""
    schema = onnx.defs.get_schema(node.op, opset, "")
    allowed = {entry.type_param_str: entry.allowed_type_strs for entry in schema.type_constraints}
    wanted = f"tensor({TensorProto.DataType.Name(onnx_type).lower()})"
    for tensors, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, tensor in enumerate(tensors):
            formal = formals[min(index, len(formals) - 1)]
            if _is_float(tensor) and wanted not in allowed.get(formal.type_str, [formal.type_str]):
                return False
    return True


def _store_constants(lowered: Iterable[gs.Node], chosen: set[int], compute: ComputeType, fix: str) -> None:
    """Let the nodes read constants of the compute type; one that other nodes read too keeps a FLOAT twin.

    `fix` is the advice where the type does not hold one.
    """
    stored: dict[int, gs.Constant] = {}
    for node in lowered:
        for index, tensor in enumerate(node.inputs):
            if not isinstance(tensor, gs.Constant) or not _is_float(tensor):
                continue
            if id(tensor) not in stored:
                _check_constant(tensor, node, compute, fix)
                alone = all(id(reader) in chosen for reader in tensor.outputs)
                name = tensor.name if alone else f"{tensor.name}.{compute.name}"
                stored[id(tensor)] = typed_constant(name, np.asarray(tensor.values).astype(compute.dtype))
            node.inputs[index] = stored[id(tensor)]


def typed_constant(name: str, array: np.ndarray[Any, Any]) -> gs.Constant:
    """An initializer of the array's type, which may be BF16."""
    onnx_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    return low_bit_constant(name, array, onnx_type) if onnx_type == TensorProto.BFLOAT16 else gs.Constant(name, array)


def _check_constant(tensor: gs.Constant, node: gs.Node, compute: ComputeType, fix: str) -> None:
    """Raise `InputError` for a number that becomes infinite, and for a scalar that loses bits below the normal range.

    Among many numbers the smallest may lose bits without harm; a scalar is an epsilon or a factor, where they count.
    """
    array = array_of(tensor)
    if array is None or array.size == 0:
        return
    where = f"constant {tensor.name!r}, which {node.op} {node.name!r} reads"
    finite = np.abs(array[np.isfinite(array)])
    largest = float(finite.max(initial=0))
    if not np.isfinite(compute.rounded(np.asarray(largest, np.float32))).all():
        raise InputError(
            f"{where}, holds {largest:g}, beyond {compute.name}'s largest number {compute.largest:g}; {fix}"
        )
    if array.size == 1 and 0 < largest < compute.smallest_normal:
        raise InputError(
            f"{where}, is {largest:g}, below {compute.name}'s smallest normal number {compute.smallest_normal:g}; {fix}"
        )


def _cast_for_readers(graph: gs.Graph, tensor: gs.Tensor, chosen: set[int], compute: ComputeType) -> list[gs.Node]:
    """At most one Cast of `tensor`, for those of its readers that want it in the other type than it is made in."""
    if not _is_float(tensor):
        return []
    made_low = any(id(node) in chosen for node in tensor.inputs)
    readers = [node for node in tensor.outputs if (id(node) in chosen) != made_low]
    if made_low and is_output(graph, tensor):
        return [_cast_of_output(tensor, chosen, compute)]
    if made_low:
        tensor.dtype = compute.dtype
    if not readers:
        return []
    suffix, onnx_type = ("fp32", TensorProto.FLOAT) if made_low else (compute.name, _onnx_type(compute))
    other = gs.Variable(f"{tensor.name}.{suffix}", helper.tensor_dtype_to_np_dtype(onnx_type), tensor.shape)
    _redirect(readers, tensor, other)
    return [gs.Node("Cast", f"{other.name}.cast", {"to": onnx_type}, [tensor], [other])]


def _cast_of_output(output: gs.Tensor, chosen: set[int], compute: ComputeType) -> gs.Node:
    """The graph's output stays FLOAT under its own name: what made it makes "<name>.<type>" instead."""
    low = gs.Variable(f"{output.name}.{compute.name}", compute.dtype, output.shape)
    _redirect([node for node in output.outputs if id(node) in chosen], output, low)
    producer = output.inputs[0]
    producer.outputs = [low if tensor is output else tensor for tensor in producer.outputs]
    return gs.Node("Cast", f"{output.name}.cast", {"to": TensorProto.FLOAT}, [low], [output])


def _redirect(readers: Iterable[gs.Node], old: gs.Tensor, new: gs.Tensor) -> None:
    for node in {id(node): node for node in readers}.values():
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def _onnx_type(compute: ComputeType) -> int:
    return int(helper.np_dtype_to_tensor_dtype(compute.dtype))
