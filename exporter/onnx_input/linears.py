"""The linear layers of a graph: products of an activation with a constant matrix, whoever exported them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from exporter.onnx_input.constants import (
    DEQUANTIZE,
    FLOAT_TYPES,
    ReadConstant,
    read_constant,
    type_name,
)
from exporter.passes.surgery import element_type, only_consumer

_PRODUCTS = ("MatMul", "Gemm")
_WEIGHT, _BIAS = ".weight", ".bias"
# `/blocks.0/fc/MatMul`: a node's name that ends in its operator, behind a module path.
_SCOPED = re.compile(r"/?(?P<path>.+)/[^/]+")


@dataclass(frozen=True)
class FoundLinear:
    """One linear layer y = x·Wᵀ + b: the nodes `first` (MatMul or Gemm) to `last` (its Add, or itself).

    `refusal` says why it cannot be quantized, "" if it can. `transposes_weight` says that W is the constant's
    transpose; `transposes_input` that x enters a Gemm transposed; `alpha` and `beta` are the Gemm's factors of W and
    b. `bias` is None where there is none, or none that is one number per output feature.
    """

    name: str
    first: gs.Node
    last: gs.Node
    constant: ReadConstant
    transposes_weight: bool
    bias: ReadConstant | None = None
    transposes_input: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    refusal: str = ""

    @property
    def x(self) -> gs.Tensor:
        """The activation."""
        return self.first.inputs[0]

    @property
    def y(self) -> gs.Tensor:
        """The result with its bias."""
        return self.last.outputs[0]

    @property
    def element_type(self) -> int:
        """The type (onnx.TensorProto) that x, the weight as it is read, and y have."""
        return self.constant.element_type

    @property
    def out_features(self) -> int:
        """N; 1 for a constant that is a vector."""
        matrix = (*self.constant.shape, 1)[:2] if len(self.constant.shape) < 2 else self.constant.shape
        return matrix[-1 if self.transposes_weight else 0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.constant.shape[-2 if self.transposes_weight and len(self.constant.shape) > 1 else -1]

    def weight(self) -> npt.NDArray[np.float32]:
        """W [N, K], Gemm's alpha included."""
        values = self.constant.values()
        if self.transposes_weight:
            values = values.T
        return np.ascontiguousarray(values * np.float32(self.alpha) if self.alpha != 1 else values)

    def bias_values(self) -> npt.NDArray[np.float32] | None:
        """b [N], Gemm's beta included; None where there is none."""
        if self.bias is None:
            return None
        values = np.broadcast_to(self.bias.values().ravel(), self.out_features)
        return np.ascontiguousarray(values * np.float32(self.beta))


def find_linears(graph: gs.Graph) -> list[FoundLinear]:
    """All products with a constant factor, in the graph's order, under names of their own.

    Products of two activations, as in attention, and convolutions are none. A layer is named by its weight's path
    (`blocks.0.fc` for `blocks.0.fc.weight`), else by its bias', its node's scope (`/blocks.0/fc/MatMul`), or its
    node's name. Nothing is loaded.
    """
    found = [replace(linear, refusal=linear.refusal or _refusal(linear)) for linear in _products(graph)]
    return _uniquely_named(found, graph)


def _products(graph: gs.Graph) -> Iterator[FoundLinear]:
    for node in graph.nodes:
        for subgraph in (value for value in node.attrs.values() if isinstance(value, gs.Graph)):
            for linear in _products(subgraph):
                yield replace(linear, refusal=f"it is in a subgraph of a node {node.op}")
        if node.op not in _PRODUCTS or node.domain not in (None, "", "ai.onnx") or len(node.inputs) < 2:
            continue
        left, right = (read_constant(tensor, dequantized=True) for tensor in node.inputs[:2])
        if right is not None and left is None:
            yield _from_matmul(graph, node, right) if node.op == "MatMul" else _from_gemm(node, right)
        elif left is not None and right is None and len(left.shape) > 1:
            yield replace(_from_matmul(graph, node, left), refusal="its weight is the left factor")


def _from_matmul(graph: gs.Graph, matmul: gs.Node, constant: ReadConstant) -> FoundLinear:
    linear = FoundLinear("", matmul, matmul, constant, transposes_weight=True)
    product = matmul.outputs[0]
    add = only_consumer(graph, product)
    if add is None or add.op != "Add" or len(constant.shape) != 2:
        return linear
    bias = read_constant(next((tensor for tensor in add.inputs if tensor is not product), product))
    if bias is None or bias.shape[-1:] != (linear.out_features,) or np.prod(bias.shape) != linear.out_features:
        return linear
    # A bias with more axes than the product would add axes to it.
    axes = len(linear.x.shape) if linear.x.shape is not None else 1
    return replace(linear, last=add, bias=bias) if len(bias.shape) <= axes else linear


def _from_gemm(gemm: gs.Node, constant: ReadConstant) -> FoundLinear:
    linear = FoundLinear(
        "",
        gemm,
        gemm,
        constant,
        transposes_weight=not gemm.attrs.get("transB", 0),
        transposes_input=bool(gemm.attrs.get("transA", 0)),
        alpha=float(gemm.attrs.get("alpha", 1.0)),
        beta=float(gemm.attrs.get("beta", 1.0)),
    )
    bias = read_constant(gemm.inputs[2]) if len(gemm.inputs) > 2 else None
    if bias is None:
        return linear
    per_feature = bias.shape in ((), (1,), (1, 1), (linear.out_features,), (1, linear.out_features))
    return replace(linear, bias=bias) if per_feature else linear


def _refusal(linear: FoundLinear) -> str:
    if any(node.op == DEQUANTIZE for node in linear.constant.steps):
        return f"its weight is quantized already ({type_name(element_type(linear.constant.stored))})"
    axes = len(linear.constant.shape)
    if axes != 2:
        return f"its weight has {axes} axes, not 2"
    if linear.element_type not in FLOAT_TYPES:
        known = ", ".join(type_name(kind) for kind in FLOAT_TYPES)
        return f"it computes in {type_name(linear.element_type)}, not one of {known}"
    return ""


def _uniquely_named(linears: Iterable[FoundLinear], graph: gs.Graph) -> list[FoundLinear]:
    """Layers that share a weight, and nameless ones, get numbers; no graph input or output is below a layer's name."""
    fixed = [tensor.name for tensor in (*graph.inputs, *graph.outputs)]
    taken: set[str] = set()
    named = []
    for linear in linears:
        stem = _path_of(linear) or linear.first.op.lower()
        name, number = stem, 1
        while name in taken or any(tensor.startswith(f"{name}.") for tensor in fixed):
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        named.append(replace(linear, name=name))
    return named


def _path_of(linear: FoundLinear) -> str:
    stored = str(linear.constant.stored.name)
    if stored.endswith(_WEIGHT):
        return stored.removesuffix(_WEIGHT)
    bias = "" if linear.bias is None else str(linear.bias.stored.name)
    if bias.endswith(_BIAS):
        return bias.removesuffix(_BIAS)
    node = str(linear.first.name)
    scoped = _SCOPED.fullmatch(node)
    if scoped is None:
        return node
    parts = scoped["path"].split("/")
    # A child of a container repeats it: `mlp/mlp.0`.
    told = [part for part, child in zip(parts, [*parts[1:], ""], strict=True) if not child.startswith(f"{part}.")]
    return ".".join(told)
