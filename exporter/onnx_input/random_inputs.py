"""Random inputs for a graph that nobody has captured inputs of, made from its inputs' types and names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from exporter.errors import InputError

DYNAMIC_SIZE = 2
"""The size of every dynamic dimension."""

TIMESTEPS = 1000
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_INTEGERS = (TensorProto.INT64, TensorProto.INT32, TensorProto.INT16, TensorProto.INT8, TensorProto.UINT8)
_TIMESTEP_NAMES = ("timestep", "time", "t", "step", "sigma")
_PASSED = ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape")


def random_inputs(model: onnx.ModelProto, source: str, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """One array per graph input: normal floats, timesteps in 0…999, masks of ones, other integers as small as the
    table that they look up in.

    Raises `InputError` for an input that is no tensor of numbers, or one of an unknown number of axes.
    """
    generator = np.random.default_rng(seed)
    return {value.name: _array(model, value, source, generator) for value in model.graph.input}


def _array(
    model: onnx.ModelProto, value: onnx.ValueInfoProto, source: str, generator: np.random.Generator
) -> npt.NDArray[Any]:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or kind.elem_type not in (*_FLOATS, *_INTEGERS, TensorProto.BOOL):
        raise InputError(
            f"{source}: input {value.name!r} is no tensor of numbers with a known number of axes, so no random inputs "
            "can be made to validate the result; --no-validate goes on without"
        )
    shape = [axis.dim_value if axis.HasField("dim_value") else DYNAMIC_SIZE for axis in kind.shape.dim]
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if kind.elem_type == TensorProto.BOOL or "mask" in value.name.lower():
        return np.ones(shape, dtype)
    if _is_timestep(value.name):
        return np.asarray(generator.integers(0, TIMESTEPS, shape), dtype)
    if kind.elem_type in _INTEGERS:
        return np.asarray(generator.integers(0, _table_rows(model, value.name), shape), dtype)
    return np.asarray(generator.standard_normal(shape), dtype)


def _is_timestep(name: str) -> bool:
    return any(word.rstrip("s") in _TIMESTEP_NAMES for word in name.lower().replace(".", "_").split("_"))


def _table_rows(model: onnx.ModelProto, name: str) -> int:
    """Rows of the smallest constant table that the input looks up in; DYNAMIC_SIZE without one."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    readers = {name}
    rows: list[int] = []
    for node in model.graph.node:
        rows += _looked_up(node, readers, sizes)
        if node.op_type in _PASSED and node.input[0] in readers:
            readers.update(node.output)
    return min(rows, default=DYNAMIC_SIZE)


def _looked_up(node: onnx.NodeProto, readers: set[str], sizes: dict[str, tuple[int, ...]]) -> Sequence[int]:
    if node.op_type != "Gather" or node.input[1] not in readers or node.input[0] not in sizes:
        return ()
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return (sizes[node.input[0]][axis],)
