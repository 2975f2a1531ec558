"""Where an ONNX file says that its weights are: only in files of the bundle, within their sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from exporter.bundle.paths import check_path
from exporter.errors import InputError

# Those of the largest 64-bit integer; Python itself refuses to read numbers of thousands.
_MOST_DIGITS = 19


def check_external_data(root: Path, path: str, sizes: Mapping[str, int]) -> None:
    """Raise `InputError` unless `path`, an ONNX file in the folder `root`, has all its weights in itself or in files
    that `sizes` (path → bytes) lists.

    No weights are read.
    """
    try:
        model = onnx.load(root / path, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{root / path}: not an ONNX file") from error
    folder = path.rpartition("/")[0]
    for tensor in _tensors_of_model(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_tensor(tensor, folder, f"{root / path}: weight {tensor.name!r}", sizes)


def _check_tensor(tensor: onnx.TensorProto, folder: str, where: str, sizes: Mapping[str, int]) -> None:
    entries = [(entry.key, entry.value) for entry in tensor.external_data]
    values = dict(entries)
    if len(values) != len(entries) or "location" not in values:
        raise InputError(f"{where}: its external data must have each key once, and a location")
    location = check_path(values["location"], f"{where}: its external data")
    listed = f"{folder}/{location}" if folder else location
    if listed not in sizes:
        raise InputError(f"{where}: its external data is in {location!r}, which is no file of the bundle")
    numbers = [values.get(key, "0") for key in ("offset", "length")]
    plain = all(number.isdecimal() and len(number) <= _MOST_DIGITS for number in numbers)
    if not plain or sum(map(int, numbers)) > sizes[listed]:
        raise InputError(f"{where}: its external data reaches beyond the end of {location!r}")


def _tensors_of_model(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)
        yield from _tensors_of_attributes(function.attribute_proto)
    for training in model.training_info:
        yield from _tensors_of_graph(training.initialization)
        yield from _tensors_of_graph(training.algorithm)


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        yield from _tensors_of_attributes(node.attribute)


def _tensors_of_attributes(attributes: Iterator[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _tensors_of_graph(graph)
