"""The operators of domain "fp4export": one op_type per variant, each with a function body in standard operators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import onnx
from onnx import helper

from plugins.block_quantize.descriptor import QuantizeBlocks
from plugins.domain import (
    BODY_OPSET,
    DOMAIN,
    OPSET_VERSION,
    PLUGIN_VERSION,
    AttributeValue,
    Variant,
    plugin_attributes,
)
from plugins.fake_quantize.descriptor import FakeQuantize
from plugins.float_boundary import Boundary
from plugins.float_dequantize.descriptor import DequantizeValues, DequantizeWeight
from plugins.float_gemm.descriptor import Gemm
from plugins.float_quantize.descriptor import OnlineQuantize, Quantize
from plugins.gelu_quantize.descriptor import GeluQuantize
from plugins.norm_quantize.descriptor import NormQuantize
from plugins.packed_linear.descriptor import PackedLinear
from plugins.token_quantize.descriptor import TokenQuantize

__all__ = [
    "BODY_OPSET",
    "DOMAIN",
    "OPSET_VERSION",
    "PLUGIN_VERSION",
    "VARIANTS",
    "AttributeValue",
    "Boundary",
    "DequantizeValues",
    "DequantizeWeight",
    "FakeQuantize",
    "GeluQuantize",
    "Gemm",
    "NormQuantize",
    "OnlineQuantize",
    "PackedLinear",
    "Quantize",
    "QuantizeBlocks",
    "TokenQuantize",
    "UnknownOperatorError",
    "Variant",
    "attach_functions",
    "function_for",
    "functions_for",
    "is_ours",
    "parse",
    "plugin_attributes",
]

VARIANTS = (
    OnlineQuantize,
    Quantize,
    QuantizeBlocks,
    FakeQuantize,
    DequantizeValues,
    DequantizeWeight,
    Gemm,
    Boundary,
    TokenQuantize,
    GeluQuantize,
    NormQuantize,
    PackedLinear,
)
"""Every operator; `parse` asks them in turn."""


class UnknownOperatorError(ValueError):
    """No operator of the domain has this op_type."""


class _HasDomain(Protocol):
    domain: str


def is_ours(node: _HasDomain) -> bool:
    """True for a node (onnx or onnx-graphsurgeon) of the project's domain."""
    return node.domain == DOMAIN


def parse(op_type: str) -> Variant:
    """The variant that `op_type` names.

    Raises UnknownOperatorError, or the UnknownFormatError or GroupError of the operator it almost names.
    """
    for kind in VARIANTS:
        variant = kind.parse(op_type)
        if variant is not None:
            return variant
    raise UnknownOperatorError(f"{op_type!r} is no operator of domain {DOMAIN!r} {OPSET_VERSION}")


def function_for(op_type: str, opset: int = BODY_OPSET) -> onnx.FunctionProto:
    """The function body of `op_type` in standard operators of version `opset`. Raises as `parse`, and OpsetError."""
    return parse(op_type).function(opset)


def functions_for(op_types: Iterable[str], opset: int = BODY_OPSET) -> list[onnx.FunctionProto]:
    """One function body per distinct op_type, sorted by name. Raises as `parse`."""
    return [function_for(op_type, opset) for op_type in sorted(set(op_types))]


def attach_functions(model: onnx.ModelProto) -> None:
    """Give the model, in place, exactly the function bodies that its nodes of the project's domain need.

    Bodies of other domains stay. Sets the domain's opset import, or removes it where no node is left. Raises as
    `parse` for a node that no variant describes, and OpsetError for a model older than the bodies.
    """
    kept = [function for function in model.functions if not is_ours(function)]
    nodes = [*_nodes(model.graph.node), *(node for function in kept for node in _nodes(function.node))]
    ours = functions_for((node.op_type for node in nodes if is_ours(node)), _standard_opset(model))
    imports = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    if ours:
        imports.append(helper.make_opsetid(DOMAIN, OPSET_VERSION))
    del model.functions[:], model.opset_import[:]
    model.functions.extend([*kept, *ours])
    model.opset_import.extend(imports)


def _standard_opset(model: onnx.ModelProto) -> int:
    """Bodies use the model's own version: onnx's checker refuses to mix versions of one domain."""
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return versions[0] if versions else BODY_OPSET


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)
