"""The pass that turns linear layers of any ONNX graph into the waist's nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import TensorProto

from exporter.onnx_input.linears import FoundLinear, find_linears
from exporter.passes.driver import Pass
from exporter.plan import LayerPlan
from exporter.targets import Target
from plugins.op import DOMAIN, DequantizeValues, DequantizeWeight, OnlineQuantize


@dataclass(frozen=True)
class StoredWeight:
    """A quantized layer as it enters the graph: codes u8 [N, K], scales f32 [N, G], bias f32 [N] or None.

    `shared_with` is the first layer with the same weight, by which the constants are named.
    """

    plan: LayerPlan
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None
    shared_with: str


def quantizer_insertion(weights: Mapping[str, StoredWeight]) -> Pass:
    """The pass that quantizes the layers called as in `weights`, which `find_linears` finds again."""

    def insert_quantizers(graph: gs.Graph, target: Target) -> int:
        """MatMul(x, W) [→ Add b], Gemm(x, W, b) → FloatQuantizeOnline → FloatDequantize_values → MatMul(·, Wᵀ) → Add.

        W is a constant behind Cast, Transpose and Identity nodes; FloatDequantize_w of its codes takes its place. All
        of it computes in FP32: Cast nodes go around where x is FP16 or BF16, one per x for all its readers. A Gemm's
        transA becomes a Transpose, alpha is part of the codes' scales, beta of the bias; an addend that is no bias is
        added afterwards. Not for layers that `weights` does not name.
        """
        _make_room(graph, weights)
        insertion = _Insertion(graph)
        linears = [linear for linear in find_linears(graph) if linear.name in weights]
        for linear in linears:
            insertion.replace(linear, weights[linear.name])
        return len(linears)

    return insert_quantizers


def _make_room(graph: gs.Graph, weights: Mapping[str, StoredWeight]) -> None:
    """Rename tensors whose names the passes are going to give: those below a quantized layer's name."""
    prefixes = tuple(f"{name}." for name in weights)
    fixed = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in list(graph.tensors().values()):
        if isinstance(tensor, gs.Variable) and tensor.name.startswith(prefixes) and id(tensor) not in fixed:
            tensor.name = f"original/{tensor.name}"


@dataclass
class _Insertion:
    graph: gs.Graph
    constants: dict[str, gs.Constant] = field(default_factory=dict)
    in_float32: dict[int, gs.Tensor] = field(default_factory=dict)

    def replace(self, linear: FoundLinear, weight: StoredWeight) -> None:
        """Put the waist's nodes in the layer's place, in the graph's order."""
        # Collected before the nodes lose their tensors.
        x, y, addend = linear.x, linear.y, self._addend(linear)
        index = next(i for i, node in enumerate(self.graph.nodes) if node is linear.first)
        linear.first.outputs.clear()
        linear.last.outputs.clear()
        nodes: list[gs.Node] = []
        product = self._quantized(linear, weight, self._input(linear, x, nodes), nodes)
        narrow = linear.element_type != TensorProto.FLOAT
        if addend is None and not narrow:
            nodes[-1].outputs = [y]
        else:
            self._finish(linear, product, addend, y, nodes)
        self.graph.nodes[index:index] = nodes

    def _addend(self, linear: FoundLinear) -> gs.Tensor | None:
        """The third input of a Gemm that is no bias."""
        gemm = linear.first
        return gemm.inputs[2] if gemm.op == "Gemm" and len(gemm.inputs) > 2 and linear.bias is None else None

    def _input(self, linear: FoundLinear, x: gs.Tensor, nodes: list[gs.Node]) -> gs.Tensor:
        if linear.transposes_input:
            turned = gs.Variable(f"{linear.name}/x.turned", x.dtype)
            nodes.append(gs.Node("Transpose", turned.name, {"perm": [1, 0]}, [x], [turned]))
            x = turned
        if linear.element_type == TensorProto.FLOAT:
            return x
        if id(x) not in self.in_float32:
            full = gs.Variable(f"{linear.name}/x.float32", np.float32)
            nodes.append(gs.Node("Cast", full.name, {"to": TensorProto.FLOAT}, [x], [full]))
            self.in_float32[id(x)] = full
        return self.in_float32[id(x)]

    def _quantized(self, linear: FoundLinear, weight: StoredWeight, x: gs.Tensor, nodes: list[gs.Node]) -> gs.Tensor:
        """Append x → quantized → product with the weight → + bias; the result."""
        plan, name = weight.plan, linear.name
        if plan.activation_format != "none":
            x = self._activation(plan, x, nodes)
        variant = DequantizeWeight(plan.weight_format, plan.group_size, plan.in_features, packed=False)
        codes = self._constant(f"{weight.shared_with}.codes", weight.codes)
        scales = self._constant(f"{weight.shared_with}.scales", weight.scales)
        decoded, turned = gs.Variable(f"{name}/w", np.float32), gs.Variable(f"{name}/w.turned", np.float32)
        product = gs.Variable(f"{name}/product", np.float32)
        nodes += [
            gs.Node(
                variant.op_type, decoded.name, variant.attributes(layer=name), [codes, scales], [decoded], domain=DOMAIN
            ),
            gs.Node("Transpose", turned.name, {"perm": [1, 0]}, [decoded], [turned]),
            gs.Node("MatMul", product.name, {}, [x, turned], [product]),
        ]
        if weight.bias is None:
            return product
        biased = gs.Variable(f"{name}/biased", np.float32)
        bias = gs.Constant(f"{name}.bias.float32", weight.bias)
        nodes.append(gs.Node("Add", biased.name, {}, [product, bias], [biased]))
        return biased

    def _activation(self, plan: LayerPlan, x: gs.Tensor, nodes: list[gs.Node]) -> gs.Tensor:
        quantize, dequantize = OnlineQuantize(plan.activation_format), DequantizeValues()
        names = (f"{plan.name}/x.{part}" for part in ("values", "scales", "dequantized"))
        values, scales, x_hat = (gs.Variable(name, np.float32) for name in names)
        for kind, inputs, outputs in ((quantize, [x], [values, scales]), (dequantize, [values, scales], [x_hat])):
            attributes = kind.attributes(layer=plan.name)
            nodes.append(gs.Node(kind.op_type, outputs[0].name, attributes, inputs, outputs, domain=DOMAIN))
        return x_hat

    def _finish(
        self, linear: FoundLinear, product: gs.Tensor, addend: gs.Tensor | None, y: gs.Tensor, nodes: list[gs.Node]
    ) -> None:
        """Append the product's Cast back to the layer's own type, and beta · addend."""
        steps: list[tuple[str, list[gs.Tensor], dict[str, int]]] = []
        if linear.element_type != TensorProto.FLOAT:
            steps.append(("Cast", [], {"to": linear.element_type}))
        if addend is not None:
            steps.append(("Add", [self._scaled(linear, addend, nodes)], {}))
        for number, (op_type, others, attributes) in enumerate(steps):
            result = y if number == len(steps) - 1 else gs.Variable(f"{linear.name}/{op_type.lower()}.{number}")
            nodes.append(gs.Node(op_type, f"{linear.name}/{op_type}", attributes, [product, *others], [result]))
            product = result

    def _scaled(self, linear: FoundLinear, addend: gs.Tensor, nodes: list[gs.Node]) -> gs.Tensor:
        if linear.beta == 1:
            return addend
        beta, scaled = gs.Variable(f"{linear.name}/beta"), gs.Variable(f"{linear.name}/addend")
        number = gs.Constant(f"{linear.name}/beta.float32", np.asarray(linear.beta, np.float32))
        nodes.append(gs.Node("Cast", beta.name, {"to": linear.element_type}, [number], [beta]))
        nodes.append(gs.Node("Mul", scaled.name, {}, [addend, beta], [scaled]))
        return scaled

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> gs.Constant:
        return self.constants.setdefault(name, gs.Constant(name, array))
