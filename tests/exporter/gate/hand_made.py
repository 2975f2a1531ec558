"""A hand-made graph of two quantized linears, each of them a block, and a reference computed in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter.gate.records import LinearRecord, ModelRecord, Reference
from exporter.passes.layer_table import LayerEntry
from plugins.float_gemm.reference import gemm
from plugins.float_quantize.reference import quantize_online
from plugins.formats import get_format
from plugins.op import DOMAIN, Gemm, OnlineQuantize, attach_functions

WIDTH, TOKENS, ROWS, PROBES = 64, 5, 40, 8
LAYERS = ("blocks.0.fc", "blocks.1.fc")


@dataclass(frozen=True)
class Example:
    """The graph, where its linears are, and what it should compute."""

    model: onnx.ModelProto
    layers: tuple[LayerEntry, ...]
    reference: Reference

    def records(self) -> dict[str, LinearRecord]:
        return {record.layer: record for record in self.reference.linears}

    def array(self, name: str) -> np.ndarray:
        """A writable copy of an initializer."""
        tensor = next(tensor for tensor in self.model.graph.initializer if tensor.name == name)
        return numpy_helper.to_array(tensor).copy()

    def with_array(self, name: str, array: np.ndarray) -> onnx.ModelProto:
        """The model with one initializer replaced."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for tensor in model.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(array, name))
        return model


def _linear_nodes(layer: str, source: str) -> list[onnx.NodeProto]:
    quantize = OnlineQuantize("e2m3")
    variant = Gemm("e2m1", "e2m3", 0, WIDTH, has_multipliers=False, packed=False, has_bias=True)
    inputs = [f"{layer}.values", f"{layer}.x_scales", f"{layer}.codes", f"{layer}.scales", f"{layer}.bias"]
    outputs = [f"{layer}.values", f"{layer}.x_scales"]
    return [
        helper.make_node(quantize.op_type, [source], outputs, domain=DOMAIN, **quantize.attributes(layer=layer)),
        helper.make_node(
            variant.op_type, inputs, [f"{layer}.output"], domain=DOMAIN, **variant.attributes(layer=layer)
        ),
    ]


def _model(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    nodes = [helper.make_node("Add", ["x", "offset"], ["blocks.0.input"])]
    nodes += _linear_nodes(LAYERS[0], "blocks.0.input")
    nodes += [helper.make_node("Add", ["blocks.0.fc.output", "blocks.0.input"], ["blocks.0.output"])]
    nodes += _linear_nodes(LAYERS[1], "blocks.0.output")
    nodes += [helper.make_node("Add", ["blocks.1.fc.output", "blocks.0.output"], ["blocks.1.output"])]
    nodes += [helper.make_node("Mul", ["blocks.1.output", "gain"], ["sample"])]
    graph = helper.make_graph(
        nodes,
        "example",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", TOKENS, WIDTH])],
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", TOKENS, WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    attach_functions(model)
    return model


def _weights(generator: np.random.Generator) -> dict[str, np.ndarray]:
    weights = {"offset": generator.normal(size=WIDTH), "gain": generator.normal(size=WIDTH)}
    for layer in LAYERS:
        weights[f"{layer}.bias"] = generator.normal(size=WIDTH)
        weights[f"{layer}.scales"] = generator.uniform(0.01, 0.1, size=(WIDTH, 1))
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    for layer in LAYERS:
        weights[f"{layer}.codes"] = generator.integers(0, 16, size=(WIDTH, WIDTH)).astype(np.uint8)
    return weights


def _linear(weights: dict[str, np.ndarray], layer: str, x: np.ndarray) -> np.ndarray:
    values, scales = quantize_online(x, get_format("e2m3"))
    codes, factors = weights[f"{layer}.codes"], weights[f"{layer}.scales"]
    return gemm(values, codes, factors, get_format("e2m1"), x_scales=scales, bias=weights[f"{layer}.bias"])


def _record(weights: dict[str, np.ndarray], layer: str, x: np.ndarray) -> LinearRecord:
    values, scales = quantize_online(x, get_format("e2m3"))
    return LinearRecord(
        layer=layer,
        weight_format="e2m1",
        activation_format="e2m3",
        rank=3,
        probes=PROBES,
        x=x,
        values=values,
        scales=scales,
        y=_linear(weights, layer, x),
        bias=weights[f"{layer}.bias"],
        noise_floor=np.full((2, WIDTH), 1e-6, np.float32),
    )


def _run(weights: dict[str, np.ndarray], x: np.ndarray) -> ModelRecord:
    seen = {"blocks.0.input": x + weights["offset"]}
    seen["blocks.0.output"] = _linear(weights, LAYERS[0], seen["blocks.0.input"]) + seen["blocks.0.input"]
    seen["blocks.1.output"] = _linear(weights, LAYERS[1], seen["blocks.0.output"]) + seen["blocks.0.output"]
    seen["sample"] = seen["blocks.1.output"] * weights["gain"]
    return ModelRecord(timestep=float(abs(x[0, 0, 0])), inputs={"x": x}, boundaries=seen)


def build_example() -> Example:
    """The graph with seeded random weights, and what numpy makes of seeded random inputs."""
    generator = np.random.default_rng(0)
    weights = _weights(generator)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    models = tuple(_run(weights, draw(batch, TOKENS, WIDTH)) for batch in (2, 1))
    linears = tuple(_record(weights, layer, draw(ROWS, WIDTH)) for layer in LAYERS)
    thresholds = dict.fromkeys(models[0].boundaries, 100.0) | {"blocks.0.output": 60.0, "blocks.1.output": 60.0}
    reference = Reference(linears, models, ("blocks.0", "blocks.1"), thresholds, 50.0, 40.0, 90.0)
    inputs = ("blocks.0.input", "blocks.0.output")
    tensors = tuple(
        LayerEntry(
            layer=layer,
            weight_format="e2m1",
            activation_format="e2m3",
            group_size=0,
            scales="channel",
            container="",
            in_features=WIDTH,
            out_features=WIDTH,
            input=source,
            values=f"{layer}.values",
            token_scales=f"{layer}.x_scales",
            output=f"{layer}.output",
            encoding="float32",
        )
        for layer, source in zip(LAYERS, inputs, strict=True)
    )
    return Example(_model(weights), tensors, reference)
