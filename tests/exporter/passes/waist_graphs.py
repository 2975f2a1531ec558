"""Small graphs as torch exports them: quantizer, dequantizers, product and bias of a few linear layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter.runtime import OnnxSession
from plugins.block_scales import BlockScaling
from plugins.containers import CONTAINERS, multipliers
from plugins.float_gemm.reference import gemm
from plugins.float_quantize.reference import quantize_online
from plugins.formats import Values, get_format
from plugins.op import (
    DOMAIN,
    Boundary,
    DequantizeValues,
    DequantizeWeight,
    OnlineQuantize,
    QuantizeBlocks,
    attach_functions,
)

TOKENS = 5
X_SHAPE = ("batch", TOKENS)


@dataclass(frozen=True)
class Weight:
    """A layer's weight and bias as calibration leaves them; `group_size` 0 has one scale a row."""

    layer: str
    format: str
    group_size: int
    codes: np.ndarray
    scales: np.ndarray
    bias: np.ndarray | None
    container: str = "auto"

    @property
    def count(self) -> int:
        return int(self.codes.shape[1])


def make_weight(
    layer: str,
    weight_format: str = "e2m1",
    group_size: int = 16,
    kind: str = "foldable",
    *,
    features: int = 24,
    count: int = 64,
    bias: bool = True,
    container: str = "int8",
    seed: int = 0,
) -> Weight:
    """Random codes; scales per "channel", free per "group", or "foldable" in `container`."""
    rng = np.random.default_rng([seed, *layer.encode()])
    fmt = get_format(weight_format)
    codes = fmt.encode(rng.uniform(-fmt.max, fmt.max, (features, count)).astype(np.float32))
    groups = count // group_size if group_size else 1
    channel = (rng.integers(2**15, 2**16, (features, 1)) / 2.0**24).astype(np.float32)
    scales = channel
    if kind == "foldable":
        allowed = multipliers(fmt, CONTAINERS[container])
        scales = channel * rng.choice(allowed, (features, groups)).astype(np.float32)
    elif kind == "group":
        scales = rng.uniform(0.001, 0.01, (features, groups)).astype(np.float32)
    offsets = rng.standard_normal(features).astype(np.float32) if bias else None
    return Weight(layer, weight_format, group_size, codes, scales, offsets)


def reference(x: Values, weight: Weight, activation_format: str) -> tuple[Values, Values]:
    """Grid values (x itself for "none") and the layer's output, in numpy."""
    values, x_scales = x, None
    if activation_format != "none":
        values, x_scales = quantize_online(x, get_format(activation_format))
    y = gemm(
        values,
        weight.codes,
        weight.scales,
        get_format(weight.format),
        group_size=weight.group_size,
        x_scales=x_scales,
        bias=weight.bias,
    )
    return values, y


@dataclass
class WaistGraph:
    """Collects nodes; `x` f32 [batch, TOKENS, K] is the input."""

    count: int = 64
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def node(self, op_type: str, *inputs: str, output: str, domain: str = "", **attributes: Any) -> str:
        outputs = output.split(",")
        node = onnx.NodeProto(op_type=op_type, domain=domain, name=f"{outputs[0]}_node", input=inputs, output=outputs)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self.nodes.append(node)
        return outputs[0]

    def constant(self, name: str, array: Any) -> str:
        self.initializers[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def boundary(self, x: str, name: str, output: str) -> str:
        marker = Boundary()
        return self.node(marker.op_type, x, output=output, domain=DOMAIN, **marker.attributes(name=name))

    def quantized(self, x: str, layer: str, activation_format: str) -> str:
        quantize, dequantize = OnlineQuantize(activation_format), DequantizeValues()
        pair = f"{layer}/values,{layer}/scales"
        self.node(quantize.op_type, x, output=pair, domain=DOMAIN, **quantize.attributes(layer=layer))
        values, scales = pair.split(",")
        attributes = dequantize.attributes(layer=layer)
        return self.node(dequantize.op_type, values, scales, output=f"{layer}/x_hat", domain=DOMAIN, **attributes)

    def quantized_in_blocks(self, x: str, layer: str, scaling: BlockScaling, input_scale: float | None) -> str:
        quantize, dequantize = QuantizeBlocks(scaling), DequantizeValues(scaling.group_size)
        values, scales = f"{layer}/values", f"{layer}/scales"
        static = [] if input_scale is None else [self.constant(f"{layer}.input_scale", np.float32(input_scale))]
        attributes = quantize.attributes(layer=layer)
        self.node(quantize.op_type, x, *static, output=f"{values},{scales}", domain=DOMAIN, **attributes)
        attributes = dequantize.attributes(layer=layer)
        return self.node(dequantize.op_type, values, scales, output=f"{layer}/x_hat", domain=DOMAIN, **attributes)

    def linear_in_blocks(self, x: str, weight: Weight, scaling: BlockScaling, input_scale: float | None) -> str:
        """The chain of a 3-D linear with block scaling; returns the name of its result."""
        x_hat = self.quantized_in_blocks(x, weight.layer, scaling, input_scale)
        return self.linear(x_hat, weight, "none")

    def weight(self, weight: Weight) -> str:
        variant = DequantizeWeight(weight.format, weight.group_size, weight.count, packed=False)
        codes = self.constant(f"{weight.layer}.codes", weight.codes)
        scales = self.constant(f"{weight.layer}.scales", weight.scales)
        attributes = variant.attributes(layer=weight.layer, container=weight.container)
        return self.node(variant.op_type, codes, scales, output=f"{weight.layer}/w", domain=DOMAIN, **attributes)

    def linear(self, x: str, weight: Weight, activation_format: str = "e2m3") -> str:
        """The chain of a 3-D linear; returns the name of its result."""
        layer = weight.layer
        x_hat = x if activation_format == "none" else self.quantized(x, layer, activation_format)
        transposed = self.node("Transpose", self.weight(weight), output=f"{layer}/wt", perm=[1, 0])
        y = self.node("MatMul", x_hat, transposed, output=f"{layer}/mm")
        if weight.bias is None:
            return y
        return self.node("Add", y, self.constant(f"{layer}.bias", weight.bias), output=f"{layer}/y")

    def model(self, *outputs: str, x_shape: tuple[str | int, ...] = X_SHAPE, rank: int = 3) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [*x_shape, self.count])
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in outputs]
        graph = helper.make_graph(self.nodes, "waist", [x], results, list(self.initializers.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        attach_functions(model)
        return model


def one_linear(weight: Weight, activation_format: str = "e2m3") -> onnx.ModelProto:
    """x → one linear layer → its output."""
    waist = WaistGraph(weight.count)
    return waist.model(waist.linear("x", weight, activation_format))


def tokens(count: int = 64, batch: int = 2, seed: int = 0) -> Values:
    """f32 [batch, TOKENS, count] with tokens of very different sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.array([1.0, 1e-3, 300.0, 1.0, 0.1])[:, None]
    return np.asarray(rng.standard_normal((batch, TOKENS, count)) * sizes, np.float32)


def run(model: onnx.ModelProto, x: Values, *names: str) -> list[np.ndarray]:
    """The model's outputs, then the tensors `names` from inside it."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    outputs = {value.name for value in probed.graph.output}
    inferred = {value.name: value for value in probed.graph.value_info}
    probed.graph.output.extend(inferred[name] for name in names if name not in outputs)
    session = OnnxSession(probed, threads=1)
    results = session.run({"x": x})
    return [results[value.name] for value in model.graph.output] + [results[name] for name in names]


def op_types(model: onnx.ModelProto) -> list[str]:
    """The graph's operators in order."""
    return [node.op_type for node in model.graph.node]


def snr_db(reference_values: np.ndarray, values: np.ndarray) -> float:
    """Signal to deviation in decibels; infinite when equal."""
    noise = float(np.square(values.astype(np.float64) - reference_values).sum())
    signal = float(np.square(reference_values.astype(np.float64)).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(signal / noise))
