"""The last check: nothing is left that the target cannot run."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from exporter.errors import InputError
from exporter.passes.surgery import CONTRIB_DOMAIN
from exporter.targets import Target
from plugins.op import is_ours

# fmt: off
_TENSORRT_OPERATORS = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "Attention",
    "AveragePool", "BatchNormalization", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear",
    "Div", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "Gather",
    "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool",
    "Greater", "GreaterOrEqual", "GridSample", "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax",
    "Identity", "If", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LayerNormalization", "LeakyRelu",
    "Less", "LessOrEqual", "Log", "LogSoftmax", "Loop", "LpNormalization", "LpPool", "MatMul", "Max", "MaxPool",
    "Mean", "MeanVarianceNormalization", "Min", "Mish", "Mod", "Mul", "Neg", "NonZero", "Not", "OneHot", "Or",
    "PRelu", "Pad", "Pow", "QuantizeLinear", "RMSNormalization", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Relu", "Reshape", "Resize", "Round", "ScatterElements", "ScatterND", "Selu", "Shape",
    "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax", "Softplus", "Softsign",
    "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Tile",
    "TopK", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
})
# fmt: on
"""Standard operators that the ONNX parser of TensorRT 10.9 and later, and TensorRT-RTX, take."""

_CONTRIB_OPERATORS = frozenset({"MultiHeadAttention"})
"""ONNX Runtime's own operators that a pass here makes."""


def refuse_unsupported(graph: gs.Graph, target: Target) -> int:
    """Changes nothing (0). Raises `InputError` naming the first layer or node that the target cannot run.

    That is a node of the project's own operators that no pass has lowered, or an operator outside the target's list.
    """
    for node in graph.nodes:
        if is_ours(node):
            layer = node.attrs.get("layer") or node.attrs.get("name") or node.name
            raise InputError(
                f"{layer}: target {target.name} cannot run {node.op}: no pass fused it into a linear layer or "
                "lowered it; keep the layer in high precision with a rule `weight: none`"
            )
        if not _known(node, graph.opset, target):
            domain = f"{node.domain}::" if node.domain else ""
            raise InputError(f"node {node.name!r}: target {target.name} cannot run operator {domain}{node.op}")
    return 0


def _known(node: gs.Node, opset: int, target: Target) -> bool:
    if node.domain == CONTRIB_DOMAIN and target.engine == "onnxruntime":
        return node.op in _CONTRIB_OPERATORS
    if node.domain not in (None, "", "ai.onnx"):
        return False
    if target.engine == "onnxruntime":
        return bool(onnx.defs.has(node.op, opset, ""))
    return node.op in _TENSORRT_OPERATORS
