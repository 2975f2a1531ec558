"""What the tests of plugins/ share: numbers that stress a rounding, and two ONNX runtimes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from plugins.formats import Format
from plugins.op import DOMAIN, Variant, attach_functions
from tests.plugins.triton_interpreter import TritonInterpreter

Arrays = dict[str, npt.NDArray[Any]]
IR_VERSION = 10


@pytest.fixture
def probe() -> Callable[[Format], npt.NDArray[np.float32]]:
    """Every value of a format, every midpoint, both float32 neighbours of each, random numbers, zeros, extremes."""

    def numbers(fmt: Format) -> npt.NDArray[np.float32]:
        values = np.unique(np.abs(fmt.values[fmt.valid]).astype(np.float64))
        beyond = [values[-1] + (values[-1] - values[-2]) / 2] if values[-1] < 1e30 else []
        points = np.concatenate([values, (values[:-1] + values[1:]) / 2, beyond]).astype(np.float32)
        near = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))])
        generator = np.random.default_rng(0)
        low, high = np.log2(fmt.step) - 3, min(np.log2(fmt.max) + 3, 127)
        random = np.exp2(generator.uniform(low, high, 20_000)).astype(np.float32)
        extremes = np.array([0.0, np.finfo(np.float32).tiny, np.finfo(np.float32).max, np.inf], np.float32)
        positive = np.concatenate([near, random, extremes])
        return np.concatenate([positive, -positive])

    return numbers


@pytest.fixture(scope="session")
def interpreter() -> Iterator[TritonInterpreter]:
    """Triton's interpreter, started when the first test asks for it."""
    process = TritonInterpreter()
    yield process
    process.close()


def value_info(name: str, dtype: np.dtype[Any], rank: int) -> onnx.ValueInfoProto:
    """Every dimension is dynamic."""
    dimensions = [f"{name}_{axis}" for axis in range(rank)]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), dimensions)


def model_of(variant: Variant, attributes: Mapping[str, str | int], inputs: Arrays, opset: int) -> onnx.ModelProto:
    """A model of one node, its function body attached."""
    node = helper.make_node(variant.op_type, variant.input_names, variant.output_names, domain=DOMAIN, name="node")
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    infos = [value_info(name, inputs[name].dtype, inputs[name].ndim) for name in variant.input_names]
    rank = inputs[variant.input_names[0]].ndim
    outputs = [value_info(name, np.dtype(np.float32), rank) for name in variant.output_names]
    graph = helper.make_graph([node], "graph", infos, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    attach_functions(model)
    onnx.checker.check_model(model)
    return model


def in_onnxruntime(model: onnx.ModelProto, inputs: Arrays) -> list[npt.NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def in_onnx_reference(model: onnx.ModelProto, inputs: Arrays) -> list[npt.NDArray[Any]]:
    return list(ReferenceEvaluator(model).run(None, inputs))


@pytest.fixture(params=[in_onnxruntime, in_onnx_reference], ids=["onnxruntime", "onnx.reference"])
def run_model(request: pytest.FixtureRequest) -> Callable[[onnx.ModelProto, Arrays], list[npt.NDArray[Any]]]:
    """Outputs of an ONNX model, in each of the two runtimes in turn."""
    return request.param


@pytest.fixture
def run_variant(run_model: Callable[..., list[npt.NDArray[Any]]]) -> Callable[..., list[npt.NDArray[Any]]]:
    """Outputs of one operator's function body: run_variant(variant, *inputs in order, opset=21)."""

    def run(variant: Variant, *inputs: npt.NDArray[Any], opset: int = 21) -> list[npt.NDArray[Any]]:
        named = dict(zip(variant.input_names, inputs, strict=True))
        return run_model(model_of(variant, variant.attributes("layer"), named, opset), named)

    return run
