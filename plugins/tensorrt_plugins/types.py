"""Element types as TensorRT's plugins call them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from onnx import TensorProto

_NAMES: Mapping[int, str] = MappingProxyType(
    {
        TensorProto.FLOAT: "FP32",
        TensorProto.FLOAT16: "FP16",
        TensorProto.BFLOAT16: "BF16",
        TensorProto.INT8: "INT8",
        TensorProto.INT32: "INT32",
        TensorProto.FLOAT8E4M3FN: "FP8",
    }
)


def type_name(element_type: int) -> str:
    """The name of an ONNX element type. Raises ValueError for one that plugins do not have."""
    if element_type not in _NAMES:
        raise ValueError(f"TensorRT's plugins have no tensors of {TensorProto.DataType.Name(element_type)}")
    return _NAMES[element_type]


def type_names(element_types: Iterable[int]) -> list[str]:
    """The names of several."""
    return [type_name(element_type) for element_type in element_types]
