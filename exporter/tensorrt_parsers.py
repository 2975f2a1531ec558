"""What the ONNX parsers of TensorRT's releases take: operators and element types, as data.

Sources: `docs/operators.md` and `docs/Changelog.md` of onnx-tensorrt. The list of 11 is the matrix of 10.15 and Swish,
less DeformConv: each operator is confirmed by the parser of TensorRT-RTX 1.7, which a test asks; the matrix of 11
could not be had. The list of 10.3 is a lower bound: the matrix of 8.5 and what the changelog adds up to 10.3, since the
matrix of 10.0, which 10.3 kept, could only be seen in part (its element types). That one documents operator versions up
to 20; that its INT4 needs version 21's `block_size` speaks for 21, but no 10.3 has been seen to parse it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from onnx import TensorProto

_STANDARD = ("", "ai.onnx")
_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MXFP8 = frozenset({"TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear"})
_FP4 = frozenset({"TRT_FP4DynamicQuantize"})


@dataclass(frozen=True)
class Parser:
    """The ONNX parser of a release.

    `operators` of the standard domain; `extensions` are TensorRT's own, in any domain. Tensors of the element types
    `types` may go anywhere; those of `quantized_types` only in and out of the operators named with them.
    """

    name: str
    operators: frozenset[str]
    extensions: frozenset[str]
    types: frozenset[int]
    quantized_types: Mapping[int, frozenset[str]]

    def takes(self, element_type: int, operator: str) -> bool:
        """Whether a tensor of this type may be an input or output of this operator."""
        return element_type in self.types or operator in self.quantized_types.get(element_type, frozenset())


# fmt: off
_OPERATORS_10_3 = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
    "BatchNormalization", "Cast", "Ceil", "Celu", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv",
    "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "Einsum", "Elu",
    "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "GRU", "Gather", "GatherElements", "GatherND",
    "Gemm", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample",
    "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax", "Identity", "If", "InstanceNormalization", "IsInf",
    "IsNaN", "LRN", "LSTM", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "Loop",
    "LpNormalization", "LpPool", "MatMul", "Max", "MaxPool", "Mean", "MeanVarianceNormalization", "Min", "Mod",
    "Mul", "Neg", "NonMaxSuppression", "NonZero", "Not", "OneHot", "Or", "PRelu", "Pad", "Pow", "QuantizeLinear",
    "RNN", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range", "Reciprocal",
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "ReverseSequence", "RoiAlign", "Round", "Scan",
    "Scatter", "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size",
    "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tan",
    "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Upsample", "Where", "Xor",
})
# fmt: on

_TYPES = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.INT32,
        TensorProto.INT64,
        TensorProto.BOOL,
    }
)

_TABLE = (
    Parser(
        name="10.3",
        operators=_OPERATORS_10_3,
        extensions=frozenset(),
        types=_TYPES,
        quantized_types=MappingProxyType(
            {TensorProto.INT8: _QDQ, TensorProto.FLOAT8E4M3FN: _QDQ, TensorProto.INT4: _QDQ}
        ),
    ),
    Parser(
        name="11",
        operators=_OPERATORS_10_3
        | {
            "Attention",
            "BlackmanWindow",
            "CastLike",
            "Gelu",
            "HammingWindow",
            "HannWindow",
            "Mish",
            "RMSNormalization",
            "RotaryEmbedding",
            "STFT",
            "Swish",
            "TensorScatter",
        },
        extensions=_FP4 | _MXFP8,
        types=_TYPES,
        quantized_types=MappingProxyType(
            {
                TensorProto.INT8: _QDQ,
                TensorProto.FLOAT8E4M3FN: _QDQ | _FP4 | _MXFP8,
                TensorProto.INT4: _QDQ,
                TensorProto.FLOAT4E2M1: _QDQ | _FP4,
                # E8M0 scales: as initializers the parser takes them as bytes only.
                TensorProto.UINT8: _MXFP8,
            }
        ),
    ),
)

PARSERS: Mapping[str, Parser] = MappingProxyType({entry.name: entry for entry in _TABLE})
"""Every release that some target needs, by name."""


def refusal(domain: str, operator: str, tensors: Mapping[str, int], parser: Parser) -> str:
    """What of a node the parser does not take, in words that go on "cannot run …"; "" if it takes all.

    `tensors` are the element types of the node's inputs and outputs by name, as far as they are known.
    """
    named = f"{domain}::{operator}" if domain else operator
    if not (domain in _STANDARD and operator in parser.operators) and operator not in parser.extensions:
        return f"operator {named}: the ONNX parser of TensorRT {parser.name} does not take it"
    for name, kind in tensors.items():
        if not parser.takes(kind, operator):
            return (
                f"{named} with {name!r} of type {TensorProto.DataType.Name(kind)}: the ONNX parser of TensorRT "
                f"{parser.name} does not take it there"
            )
    return ""
