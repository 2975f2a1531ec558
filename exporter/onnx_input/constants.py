"""Constants of a graph, seen through the Cast, Transpose and Identity nodes that stand before their readers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper
from onnx_graphsurgeon.logger import G_LOGGER

from exporter.passes.surgery import element_type, producer

FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TRANSPARENT = ("Cast", "Identity", "Transpose")
DEQUANTIZE = "DequantizeLinear"


@dataclass(frozen=True)
class ReadConstant:
    """A constant as a node reads it: `stored`, then the nodes `steps` in their order. Nothing is loaded to find it.

    `shape` and `element_type` (onnx.TensorProto) are those after the steps.
    """

    stored: gs.Constant
    steps: tuple[gs.Node, ...]
    shape: tuple[int, ...]
    element_type: int

    def values(self) -> npt.NDArray[np.float32]:
        """The numbers that the reader gets, as float32 (bfloat16 and float16 fit exactly)."""
        with G_LOGGER.suppress(G_LOGGER.ERROR):
            array: npt.NDArray[Any] = self.stored.values
        for node in self.steps:
            if node.op == "Transpose":
                array = np.transpose(array, node.attrs.get("perm"))
            elif node.op == "Cast":
                array = array.astype(helper.tensor_dtype_to_np_dtype(int(node.attrs["to"])))
        return np.ascontiguousarray(array, np.float32)


def read_constant(tensor: gs.Tensor, *, dequantized: bool = False) -> ReadConstant | None:
    """What the reader of `tensor` gets if that is a constant behind nothing but Cast, Transpose and Identity nodes.

    With `dequantized` also behind DequantizeLinear, for its shape: the numbers of such a constant are not to be read.
    """
    passed = (*_TRANSPARENT, DEQUANTIZE) if dequantized else _TRANSPARENT
    steps: list[gs.Node] = []
    while not isinstance(tensor, gs.Constant):
        node = producer(tensor)
        if node is None or node.op not in passed or node.domain not in (None, "", "ai.onnx"):
            return None
        steps.insert(0, node)
        tensor = node.inputs[0]
    shape, kind = tuple(int(size) for size in tensor.shape), element_type(tensor)
    for node in steps:
        if node.op == "Transpose":
            shape = tuple(shape[axis] for axis in node.attrs.get("perm", range(len(shape))[::-1]))
        elif node.op == "Cast":
            kind = int(node.attrs["to"])
        elif node.op == DEQUANTIZE and node.inputs[1].dtype is not None:
            kind = element_type(node.inputs[1])
    return ReadConstant(tensor, tuple(steps), shape, kind)


def type_name(kind: int) -> str:
    """The ONNX name of an element type: ``FLOAT16``."""
    return str(onnx.TensorProto.DataType.Name(kind))
