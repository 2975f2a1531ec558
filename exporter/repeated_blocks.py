"""A transformer's graph from one trace of each kind of block, repeated with every block's own weights.

Tracing takes seconds a block, and a transformer's blocks are one module with other weights, or a few. So the model is
traced with a placeholder node for each block; every kind of block is traced once, as a function of its arguments and of
its weights (of which nothing can be folded into the graph then); copies of that graph take the placeholders' places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from exporter.block_calls import BlockCall, NotRepeatedError
from exporter.block_kinds import Facts, block_facts, block_tensors
from exporter.quantize import share_copy
from exporter.tracing import batch_axis, marked_boundaries, trace
from plugins.op import DOMAIN, OPSET_VERSION

_PLACEHOLDER = "RepeatedBlock"
_NAME = "name"
_OUTPUT = "output"


@dataclass
class BlockKind:
    """Blocks with equal facts that are called alike; the first is the one that is traced."""

    call: BlockCall
    paths: list[str] = field(default_factory=list)


class _Placeholder(nn.Module):
    """Stands for a block in a trace: one node, whose inputs are all tensors that the block is called with.

    It has the block's parts, since a model may use some of them elsewhere.
    """

    def __init__(self, path: str, block: nn.Module, calls: dict[str, BlockCall]) -> None:
        super().__init__()
        self._path = path
        self._calls = calls
        for name, part in block.named_children():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states' shape and type, that is, those of the first argument."""
        self._calls[self._path], tensors = BlockCall.of(self._path, args, kwargs)
        hidden = tensors[0]
        return symbolic(
            f"{DOMAIN}::{_PLACEHOLDER}",
            tensors,
            attrs={_NAME: self._path},
            dtype=hidden.dtype,
            shape=hidden.shape,
            version=OPSET_VERSION,
        )


class _BlockFunction(nn.Module):
    """A block as a function of the tensors that it is called with, followed by its own parameters and buffers."""

    def __init__(self, block: nn.Module, call: BlockCall) -> None:
        super().__init__()
        # Not a submodule: its weights are arguments.
        self._hidden = (block,)
        self._call = call
        self._names = list(block_tensors(block))

    def forward(self, *tensors: Tensor) -> Tensor:
        count = len(self._call.tensors)
        args, kwargs = self._call.arguments(tensors[:count])
        weights = dict(zip(self._names, tensors[count:], strict=True))
        output: Tensor = torch.func.functional_call(self._hidden[0], weights, args, kwargs)
        return output


def with_placeholders(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]
) -> tuple[nn.Module, dict[str, BlockCall]]:
    """A copy of `model` on the same memory with placeholders for `blocks`, and what these will be called with.

    Raises `NotRepeatedError` where no two blocks have equal facts.
    """
    if max(Counter(block_facts(path, block) for path, block in blocks).values(), default=0) < 2:
        raise NotRepeatedError("no two blocks are alike")
    copy = share_copy(model)
    calls: dict[str, BlockCall] = {}
    for path, block in blocks:
        copy.set_submodule(path, _Placeholder(path, block, calls))
    return copy, calls


def repeat_blocks(
    graph: ir.Model,
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    skips: Mapping[str, Mapping[str, str]],
    calls: Mapping[str, BlockCall],
    prefix: str,
) -> int:
    """Put every block's graph in the place of its placeholder in `graph`; return how many kinds were traced.

    Weights get the name `prefix` + their path in `model`. Raises `NotRepeatedError` for blocks that cannot be copied.
    """
    placeholders = {
        node.attributes[_NAME].as_string(): node
        for node in graph.graph
        if node.domain == DOMAIN and node.op_type == _PLACEHOLDER
    }
    if sorted(placeholders) != sorted(calls) or len(calls) != len(blocks):
        raise NotRepeatedError("the blocks do not run once each")
    names = _weight_names(graph.graph, model, prefix)
    modules = dict(blocks)
    kinds = _kinds(blocks, skips, calls)
    for kind in kinds:
        first = kind.paths[0]
        traced = _traced(first, modules[first], kind.call, skips)
        constants = _shared_constants(graph.graph, traced.graph, first)
        for path in kind.paths:
            weights = [_weight(graph.graph, names, tensor) for tensor in block_tensors(modules[path]).values()]
            given = [*placeholders[path].inputs, *weights]
            values = dict(constants) | dict(zip(traced.graph.inputs, given, strict=True))
            _put(graph.graph, traced.graph, placeholders[path], values, (first, path))
    # As in a whole trace: small constants are computed now, and what blocks compute from what they share but once.
    fold_constants(graph, onnx_shape_inference=False)
    CommonSubexpressionEliminationPass()(graph)
    _drop_unused_weights(graph.graph)
    return len(kinds)


def _kinds(
    blocks: Sequence[tuple[str, nn.Module]], skips: Mapping[str, Mapping[str, str]], calls: Mapping[str, BlockCall]
) -> list[BlockKind]:
    found: dict[tuple[Facts, ...], list[BlockKind]] = {}
    kinds = []
    for path, block in blocks:
        call = calls[path]
        same = found.setdefault((block_facts(path, block), tuple(sorted(skips.get(path, ())))), [])
        kind = next((kind for kind in same if kind.call == call), None)
        if kind is None:
            kind = BlockKind(call)
            same.append(kind)
            kinds.append(kind)
        kind.paths.append(path)
    return kinds


def _traced(path: str, block: nn.Module, call: BlockCall, skips: Mapping[str, Mapping[str, str]]) -> ir.Model:
    batch = batch_axis()
    given = call.tensors
    weights = list(block_tensors(block).values())
    axes = [{axis: batch for axis, size in enumerate(tensor.shape) if size is None} for tensor in given]
    names = [f"argument_{index}" for index in range(len(given))] + [f"weight_{index}" for index in range(len(weights))]
    arguments = [*(tensor.example() for tensor in given), *weights]
    shapes = ((*axes, *({} for _ in weights)),)
    with marked_boundaries([(path, block)], skips):
        traced = trace(_BlockFunction(block, call), arguments, shapes, names, _OUTPUT)
    inner = traced.graph
    nested = any(attribute.type in _GRAPHS for node in inner for attribute in node.attributes.values())
    if nested or len(inner.inputs) != len(arguments) or len(inner.outputs) != 1 or inner.outputs[0].producer() is None:
        raise NotRepeatedError(f"{path} is not a plain function of its arguments")
    return traced


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _weight_names(graph: ir.Graph, model: nn.Module, prefix: str) -> dict[int, str]:
    """id of a parameter or buffer → its name: where modules share it, one that the graph has already, or the first."""
    names: dict[int, str] = {}
    for path, tensor in block_tensors(model).items():
        name = f"{prefix}{path}"
        if id(tensor) not in names or name in graph.initializers:
            names[id(tensor)] = name
    return names


def _weight(graph: ir.Graph, names: Mapping[int, str], tensor: Tensor) -> ir.Value:
    name = names[id(tensor)]
    if name not in graph.initializers:
        graph.register_initializer(_initializer(name, TorchTensor(tensor.detach(), name)))
    return graph.initializers[name]


def _initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def _shared_constants(graph: ir.Graph, inner: ir.Graph, path: str) -> dict[ir.Value, ir.Value]:
    """The traced block's own constants, such as axes, as constants of the whole graph."""
    constants = {}
    for name, value in inner.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise NotRepeatedError(f"{path} has a constant {name} without a value")
        constants[value] = _initializer(f"{path}/{name}", tensor)
        graph.register_initializer(constants[value])
    return constants


def _put(
    graph: ir.Graph,
    inner: ir.Graph,
    placeholder: ir.Node,
    values: dict[ir.Value, ir.Value | None],
    paths: tuple[str, str],
) -> None:
    """Copy the nodes of `inner` into the placeholder's place; `paths` are those of the traced block and of this one."""
    copies = []
    for node in inner:
        inputs = [None if value is None else values[value] for value in node.inputs]
        attributes = [_renamed(attribute, paths) for attribute in node.attributes.values()]
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            attributes,
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"{paths[1]}/{node.name}",
        )
        for value, copied in zip(node.outputs, copy.outputs, strict=True):
            copied.name = f"{paths[1]}/{value.name}"
            values[value] = copied
        copies.append(copy)
    graph.insert_before(placeholder, copies)
    output = values[inner.outputs[0]]
    if output is None:
        raise NotRepeatedError(f"{paths[1]} gives nothing")
    ir.convenience.replace_all_uses_with(placeholder.outputs[0], output)
    graph.remove(placeholder, safe=True)


def _renamed(attribute: ir.Attr, paths: tuple[str, str]) -> ir.Attr:
    """The attribute; a text that begins with the traced block's path begins with this block's."""
    first, path = paths
    if attribute.type == ir.AttributeType.STRING and attribute.as_string().startswith(f"{first}."):
        return ir.AttrString(attribute.name, path + attribute.as_string().removeprefix(first))
    return attribute


def _drop_unused_weights(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
