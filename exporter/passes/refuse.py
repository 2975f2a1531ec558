"""The last check: nothing is left that the target cannot run."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.errors import InputError
from exporter.passes.inference import element_types
from exporter.passes.plugins.kernel_nodes import kernel_of
from exporter.passes.surgery import CONTRIB_DOMAIN
from exporter.targets import Target
from exporter.tensorrt_parsers import PARSERS, Parser, refusal
from plugins.op import PackedLinear, is_ours

_STANDARD = (None, "", "ai.onnx")


# Convolutions with FP32 results are built everywhere.
_PRODUCTS = frozenset({"Einsum", "Gemm", "MatMul"})


def refuse_unsupported(graph: gs.Graph, target: Target) -> int:
    """Changes nothing (0). Raises `InputError` naming the first layer or node that the target cannot run.

    That is a node of the project's own operators that no pass has lowered and that is no plugin, or for ONNX Runtime a
    node outside the standard and the runtime's own domain, or for TensorRT an operator or an element type that one of
    the parsers the target must do with lacks, or a matrix product with an FP32 result where its builder has none.
    """
    for node in graph.nodes:
        if _is_plugin(node, target):
            continue
        if is_ours(node):
            layer = node.attrs.get("layer") or node.attrs.get("name") or node.name
            raise InputError(
                f"{layer}: target {target.name} cannot run {node.op}: no pass fused it into a linear layer or "
                "lowered it; keep the layer in high precision with a rule `weight: none`"
            )
        if target.engine == "onnxruntime" and not _is_onnxruntimes(node, graph.opset):
            raise InputError(f"{_named(node)}: target {target.name} cannot run operator {_operator(node)}")
    types = element_types(graph) if target.parsers else {}
    for parser in (PARSERS[name] for name in target.parsers):
        for node in graph.nodes:
            if not is_ours(node):
                _check_node(node, types, parser, target)
    if not target.fp32_products:
        _check_products(graph, types, target)
    return 0


def _is_plugin(node: gs.Node, target: Target) -> bool:
    """Whether the node is an operator with a kernel for the target. Raises `InputError` for one with none yet."""
    operator = kernel_of(node)
    if operator is None or target.kernels != "plugin":
        return False
    if isinstance(operator, PackedLinear) and not operator.is_quantized and operator.float_type == "fp32":
        raise InputError(
            f"{node.attrs['layer']}: target {target.name} has no kernel for weights alone with FP32 activations; use "
            "`compute: fp16` (or bf16)"
        )
    return True


def _check_products(graph: gs.Graph, types: Mapping[str, int], target: Target) -> None:
    for node in graph.nodes:
        if node.op in _PRODUCTS and types.get(node.outputs[0].name) == TensorProto.FLOAT:
            raise InputError(
                f"node {node.name!r}: target {target.name} cannot run {node.op} with an FP32 result: TensorRT-RTX "
                "builds none for its GPU; use `compute: fp16`"
            )


def _check_node(node: gs.Node, types: Mapping[str, int], parser: Parser, target: Target) -> None:
    names = [tensor.name for tensor in (*node.inputs, *node.outputs)]
    tensors = {name: types[name] for name in names if types.get(name) is not None}
    reason = refusal(node.domain or "", str(node.op), tensors, parser)
    if reason:
        raise InputError(f"{_named(node)}: target {target.name} cannot run {reason}")


def _named(node: gs.Node) -> str:
    return f"node {node.name!r}" if node.name else f"the node that makes {node.outputs[0].name!r}"


def _operator(node: gs.Node) -> str:
    return f"{node.domain}::{node.op}" if node.domain else str(node.op)


def _is_onnxruntimes(node: gs.Node, opset: int) -> bool:
    """True for the standard's operators and ONNX Runtime's own, of which it names those that it lacks when it loads."""
    return node.domain == CONTRIB_DOMAIN or (node.domain in _STANDARD and bool(onnx.defs.has(node.op, opset, "")))
