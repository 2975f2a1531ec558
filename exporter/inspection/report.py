"""One file's content as data, for the terminal and for programs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from exporter.errors import InputError
from exporter.inspection.engine import look_at_engine
from exporter.inspection.layers import LayersView, LayerView, plain_layers, table_layers, unfused_layers, with_outputs
from exporter.onnx_files import nodes_of, read_model, total_bytes
from exporter.onnx_input.model import GraphState, state_of
from exporter.passes.history import PassResult, read_pass_history
from exporter.passes.layer_table import TARGET_KEY, read_layer_table
from exporter.passes.tiling import untiled
from exporter.targets import SUFFIXES

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_FP32_BYTES = 4
_ENGINE_SUFFIXES = {suffix for engine, suffixes in SUFFIXES.items() if engine != "onnxruntime" for suffix in suffixes}


@dataclass(frozen=True)
class Totals:
    """Sizes and counts. `file_bytes` includes weights in files of their own; `share_of_fp32` is its part of
    `parameters` in FP32. `high_precision_parameters` are the floats outside quantized layers, single
    numbers aside."""

    file_bytes: int
    share_of_fp32: float | None
    parameters: int
    high_precision_parameters: int
    quantized_layers: int
    nodes: int


@dataclass(frozen=True)
class Inspection:
    """What is in a file. `graph` is the ONNX file that was looked at, None for an engine of unknown origin; `state` is
    "foreign", "exported" or "lowered" ("unknown" without a graph); `passes` is empty where no pass ran."""

    file: str
    header: str
    note: str
    graph: str | None
    state: str
    target: str
    opset: int
    totals: Totals
    layers: tuple[LayerView, ...]
    operators: Mapping[str, int]
    passes: tuple[PassResult, ...]

    def to_json(self) -> str:
        """One indented JSON document with the same names."""
        return json.dumps(asdict(self), indent=1)


def inspect_path(path: Path) -> Inspection:
    """Look into an .onnx file or an engine. Raises `InputError` for anything else, and for a damaged file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; inspect takes an .onnx file or an engine (.plan, .engine)")
    if path.suffix not in _ENGINE_SUFFIXES:
        return _of_graph(path, path, "ONNX", "")
    engine = look_at_engine(path)
    if engine.graph is None:
        totals = Totals(path.stat().st_size, None, 0, 0, 0, 0)
        return Inspection(str(path), engine.header, engine.note, None, "unknown", "", 0, totals, (), {}, ())
    return _of_graph(path, engine.graph, engine.header, engine.note)


def _of_graph(file: Path, graph: Path, header: str, note: str) -> Inspection:
    light = read_model(graph, external_data=False)
    size = total_bytes(graph) if file == graph else file.stat().st_size
    state, table = state_of(light), read_layer_table(light)
    if state is GraphState.FOREIGN:
        # Names and shapes are inferred from small constants, which may be in another file.
        view = plain_layers(read_model(graph))
    else:
        view = table_layers(untiled(light), table) if table else unfused_layers(light)
        view = with_outputs(view, light)
    operators = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in _nodes(light))
    target = next((entry.value for entry in light.metadata_props if entry.key == TARGET_KEY), "")
    return Inspection(
        str(file),
        header,
        note,
        str(graph),
        state.value,
        target,
        next((entry.version for entry in light.opset_import if entry.domain in ("", "ai.onnx")), 0),
        _totals(light, view, size),
        view.layers,
        dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        read_pass_history(light),
    )


def _totals(model: onnx.ModelProto, view: LayersView, size: int) -> Totals:
    outside = sum(
        math.prod(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.dims and tensor.data_type in _FLOATS and tensor.name not in view.parts
    )
    parameters = view.parameters + outside
    return Totals(
        file_bytes=size,
        share_of_fp32=size / (parameters * _FP32_BYTES) if parameters else None,
        parameters=parameters,
        high_precision_parameters=outside,
        quantized_layers=len(view.layers) if view.quantized else 0,
        nodes=sum(1 for _ in _nodes(model)),
    )


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The graph's nodes and those of its subgraphs, without function bodies."""
    return nodes_of(model.graph.node)
