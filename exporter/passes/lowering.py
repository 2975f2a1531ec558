"""What the lowerings share: one walk over the graph that replaces the project's operators by a target's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from exporter.byte_tables import look_up
from exporter.passes.surgery import Splicer, array_of, is_output, online_quantizer, variant_of
from plugins.block_scales import BlockScaling
from plugins.body import Body
from plugins.container_product import ContainerProduct
from plugins.containers import CONTAINERS
from plugins.fake_quantize.function_body import OnlineFn, append_fake_quantize
from plugins.formats import Format, get_format
from plugins.op import FakeQuantize, Gemm, QuantizeBlocks
from plugins.packing import unpack


@dataclass(frozen=True)
class Activation:
    """An activation as a matrix product takes it: numbers of a container, and a scale per token for the result, None
    where the numbers have their scales in them.

    `one` is a scalar that is 1 at run time where the lowering makes one, else None.
    """

    numbers: gs.Tensor
    scales: gs.Tensor | None
    one: gs.Tensor | None = None


@dataclass(frozen=True)
class Quantizer:
    """One FloatQuantizeOnline or FloatQuantizeBlocks node and the tensors that the nodes in its place must write.

    `layer` is the first layer that reads it; `container` is the one to quantize into; `scaling` and the static
    `tensor_scale` are None where there are none.
    """

    layer: str
    format: Format
    container: str
    x: gs.Tensor
    values: gs.Tensor
    scales: gs.Tensor
    scaling: BlockScaling | None
    tensor_scale: gs.Tensor | None


@dataclass(frozen=True)
class Layer:
    """One FloatGemm node, taken apart. `weight_scales` is f32 [N, 1] or [N, G]; `multipliers` i32 [N, G]."""

    name: str
    gemm: Gemm
    container: str
    x: gs.Tensor
    stored: gs.Tensor
    weight_scales: npt.NDArray[np.float32]
    multipliers: npt.NDArray[np.int32] | None
    bias: gs.Tensor | None
    y: gs.Tensor

    @property
    def format(self) -> Format:
        """The weight format."""
        return get_format(self.gemm.weight_format)

    @property
    def product(self) -> ContainerProduct | None:
        """What the layer's product in its container is, with the multipliers that it has; None for block scaling."""
        if self.gemm.scaling is not None:
            return None
        quantized = self.gemm.quantizes_activations
        found = (1,) if self.multipliers is None else tuple(int(entry) for entry in np.unique(self.multipliers))
        return ContainerProduct(
            weight_format=self.format,
            activation_format=get_format(self.gemm.activation_format) if quantized else None,
            container=CONTAINERS[self.container],
            k=self.gemm.count,
            multipliers=found,
            free_groups=self.gemm.has_group_scales,
        )

    def codes(self) -> npt.NDArray[np.uint8]:
        """The weight's codes [N, K]."""
        stored: npt.NDArray[Any] = np.asarray(self.stored.values)
        return unpack(stored, self.format.bits, self.gemm.count) if self.gemm.packed else stored

    def numerators(self) -> npt.NDArray[np.signedinteger[Any]]:
        """The weight in units of the format's step, times the groups' multipliers: [N, K], in integers no wider than
        the largest product needs."""
        largest = self.format.max_numerator * (1 if self.multipliers is None else int(self.multipliers.max()))
        # Of the negative number below it: what holds −128 need not hold 128.
        dtype = np.min_scalar_type(-largest - 1)
        table, codes = self.format.numerators.astype(dtype), self.codes()
        numerators = look_up(table, codes) if dtype.itemsize == 1 else table[codes]
        if self.multipliers is None:
            return numerators
        size = self.gemm.group_size
        grouped = numerators.reshape(len(numerators), -1, size) * self.multipliers[:, :, None].astype(dtype)
        return np.asarray(grouped.reshape(numerators.shape))


@dataclass(frozen=True)
class FakeQuantizer:
    """One FloatFakeQuantize node, which rounds the output `x` of `layer` to `y`."""

    layer: str
    variant: FakeQuantize
    x: gs.Tensor
    y: gs.Tensor

    @property
    def format(self) -> Format:
        """The format that is rounded to."""
        return get_format(self.variant.format)

    def nodes(self, splicer: Splicer, online: OnlineFn | None = None, **tensors: gs.Tensor) -> list[gs.Node]:
        """The operator's definition in ordinary nodes, with a target's own quantizer, which may read `tensors`."""
        body = Body(f"{self.layer}.quantizer.")
        append_fake_quantize(body, "x", "y", self.format, self.variant.group_size, online)
        return splicer.nodes(body, {"x": self.x, "y": self.y, **tensors})


QuantizeFn: TypeAlias = Callable[[Quantizer, Splicer], tuple[list[gs.Node], Activation]]
MultiplyFn: TypeAlias = Callable[[Layer, Activation | None, Splicer], list[gs.Node]]
FakeQuantizeFn: TypeAlias = Callable[[FakeQuantizer, Splicer], list[gs.Node]]


def lower(graph: gs.Graph, quantize: QuantizeFn, multiply: MultiplyFn, fake_quantize: FakeQuantizeFn) -> int:
    """Replace quantizers by `quantize` (once per container that reads them), FloatGemm nodes by `multiply` and
    FloatFakeQuantize nodes by `fake_quantize`.

    A quantizer with other readers than FloatGemm, and a FloatGemm whose weight is not constant or whose activation is
    not quantized here, stay, for `refuse_unsupported` to name.
    """
    splicer = Splicer()
    activations: dict[tuple[int, str], Activation] = {}
    nodes: list[gs.Node] = []
    lowered = 0
    for node in list(graph.nodes):
        new: list[gs.Node] = []
        layer, fake_quantizer = layer_of(node), fake_quantizer_of(node)
        if online_quantizer(node) is not None and read_by_gemms(graph, node):
            values = node.outputs[0]
            for quantizer in _quantizers(node):
                made, activation = quantize(quantizer, splicer)
                activations[id(values), quantizer.container] = activation
                new += made
        elif layer is not None:
            activation_of_layer = activations.get((id(layer.x), layer.container))
            if activation_of_layer is not None or not layer.gemm.quantizes_activations:
                node.inputs.clear()
                node.outputs.clear()
                new = multiply(layer, activation_of_layer, splicer)
        elif fake_quantizer is not None:
            node.inputs.clear()
            node.outputs.clear()
            # Inference does not find it through the reshapes of groups; attention is looked for by it.
            fake_quantizer.y.shape = fake_quantizer.x.shape
            new = fake_quantize(fake_quantizer, splicer)
        lowered += bool(new)
        nodes += new or [node]
    graph.nodes = nodes
    return lowered


def _quantizers(node: gs.Node) -> list[Quantizer]:
    """One per container, integers first: the first writes the node's own tensors, which it is freed of."""
    variant = online_quantizer(node)
    if variant is None:
        raise ValueError(f"{node.op} is no online quantizer")
    x, *static = node.inputs
    (values, scales), layer = tuple(node.outputs), node.attrs["layer"]
    scaling = variant.scaling if isinstance(variant, QuantizeBlocks) else None
    containers = sorted(
        {reader.attrs["container"] for reader in values.outputs}, key=lambda name: (name != "int8", name)
    )
    node.inputs.clear()
    node.outputs.clear()
    quantizers = []
    for index, container in enumerate(containers):
        if index:
            values = gs.Variable(f"{layer}.values.{container}")
            scales = gs.Variable(f"{layer}.token_scales.{container}")
        quantizers.append(
            Quantizer(
                layer=layer,
                format=get_format(variant.format),
                container=container,
                x=x,
                values=values,
                scales=scales,
                scaling=scaling,
                tensor_scale=static[0] if static else None,
            )
        )
    return quantizers


def layer_of(node: gs.Node) -> Layer | None:
    """The node taken apart, if it is a FloatGemm with constant weights."""
    gemm = variant_of(node, Gemm)
    if gemm is None:
        return None
    inputs = dict(zip(gemm.input_names, node.inputs, strict=True))
    stored = inputs["words" if gemm.packed else "codes"]
    scales = array_of(inputs["weight_scales"])
    multipliers = array_of(inputs["multipliers"]) if gemm.has_multipliers else None
    constant = isinstance(stored, gs.Constant) and scales is not None
    if not constant or (gemm.has_multipliers and multipliers is None):
        return None
    return Layer(
        name=node.attrs["layer"],
        gemm=gemm,
        container=node.attrs["container"],
        x=node.inputs[0],
        stored=stored,
        weight_scales=np.asarray(scales, np.float32),
        multipliers=multipliers,
        bias=inputs.get("bias"),
        y=node.outputs[0],
    )


def fake_quantizer_of(node: gs.Node) -> FakeQuantizer | None:
    """The node taken apart, if it is a FloatFakeQuantize."""
    variant = variant_of(node, FakeQuantize)
    return None if variant is None else FakeQuantizer(node.attrs["layer"], variant, node.inputs[0], node.outputs[0])


def append_epilogue(body: Body, product: str, factors: Sequence[str], *, has_bias: bool) -> None:
    """product · factors + "bias" → "y"."""
    steps = [("Mul", factor) for factor in factors] + [("Add", "bias")] * has_bias
    for index, (op_type, operand) in enumerate(steps, start=1):
        product = body.op(op_type, product, operand, output="y" if index == len(steps) else None)
    if not steps:
        body.op("Identity", product, output="y")


def read_by_gemms(graph: gs.Graph, node: gs.Node) -> bool:
    """Whether FloatGemm nodes with constant weights, and nothing else, read what a quantizer makes."""
    readers = [reader for tensor in node.outputs for reader in tensor.outputs]
    lowerable = all(layer_of(reader) is not None for reader in readers)
    return bool(readers) and lowerable and not any(is_output(graph, tensor) for tensor in node.outputs)
