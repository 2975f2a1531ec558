"""ONNX files of any size: one file where protobuf's 2 GiB allow it, else with the weights in a file beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor

from exporter.errors import InputError
from exporter.files import atomic_path, sha256_of

LARGEST_FILE_BYTES = 1_500_000_000
"""Beyond this the weights go to a file of their own: a protobuf ends at 2 GiB."""
LARGEST_WORK_FILE_BYTES = 64_000_000
"""The same for graphs between two stages. In one file their weights would be copied twice more, to be written and to be
read, and whoever asks for the nodes alone would read them, too."""

_SMALLEST_EXTERNAL = 1024
_LOCATION, _LENGTH = "location", "length"


def data_path(path: Path) -> Path:
    """Where the weights of a model too large for one file are: NAME.onnx.data."""
    return path.with_name(f"{path.name}.data")


def read_model(path: Path, *, external_data: bool = True) -> onnx.ModelProto:
    """The ONNX model in a file. Raises `InputError` for one that is missing, unreadable or not ONNX."""
    try:
        model = onnx.load(path, load_external_data=external_data)
    except (OSError, onnx.checker.ValidationError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except DecodeError as error:
        raise InputError(f"{path}: not an ONNX file, or a damaged one") from error
    if not model.graph.node:
        raise InputError(f"{path}: not an ONNX file, or one without a graph")
    return model


def nodes_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from nodes_of(graph.node)


def with_values(tensor: TensorProto, folder: Path | None) -> TensorProto:
    """The tensor itself, or where a file in `folder` has its values, a copy that has them.

    Raises `InputError` where they cannot be read.
    """
    if tensor.data_location != TensorProto.EXTERNAL or folder is None:
        return tensor
    copy = TensorProto()
    copy.CopyFrom(tensor)
    try:
        load_external_data_for_tensor(copy, str(folder))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise InputError(f"{folder}: the values of {tensor.name} cannot be read: {error}") from error
    copy.data_location = TensorProto.DEFAULT
    del copy.external_data[:]
    return copy


def save_onnx(
    model: onnx.ModelProto,
    path: Path,
    largest: int = LARGEST_FILE_BYTES,
    final: Path | None = None,
    folder: Path | None = None,
) -> None:
    """Write `model`, which stays as it is, to `path`, whole or not at all.

    Weights of more than `largest` bytes go to `data_path`; otherwise a file of that name is removed if the model that
    was in `path` before had its weights there. With `final`, both files are going to be renamed to that name (see
    `rename_data`). Weights that the model lacks are read from `folder`, one at a time. Raises `InputError` where
    nothing can be written.
    """
    data = data_path(path)
    if sum(_bytes_of(tensor) for tensor in model.graph.initializer) <= largest:
        outdated = _has_weights_in(path, data)
        if folder is not None:
            model = with_initializers(model, [with_values(tensor, folder) for tensor in model.graph.initializer])
        with atomic_path(path) as temporary:
            onnx.save(model, temporary)
        if outdated:
            data.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary, atomic_path(data) as weights:
        location = data_path(final or path).name
        tensors = (with_values(tensor, folder) for tensor in model.graph.initializer)
        onnx.save(with_initializers(model, _write(tensors, weights, location)), temporary)


def _bytes_of(tensor: TensorProto) -> int:
    elsewhere = (int(entry.value) for entry in tensor.external_data if entry.key == _LENGTH)
    return sum(elsewhere) or len(tensor.raw_data)


def rename_data(path: Path, final: Path) -> None:
    """Rename the file with the weights of the model in `path`, if it has one, for the model's new name `final`."""
    if data_path(path).is_file():
        data_path(path).replace(data_path(final))
    else:
        data_path(final).unlink(missing_ok=True)


def _has_weights_in(path: Path, data: Path) -> bool:
    """True for an ONNX file in `path` that points to `data`."""
    if not (path.is_file() and data.is_file()):
        return False
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return False
    return any(file.exists() and file.samefile(data) for file in external_files(model, path))


def external_files(model: onnx.ModelProto, path: Path) -> frozenset[Path]:
    """The files that the weights of `model`, read from `path` without them, are in."""
    return frozenset(
        path.parent / entry.value
        for tensor in _tensors(model.graph)
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == _LOCATION
    )


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t
        elif attribute.type == onnx.AttributeProto.GRAPH:
            yield from _tensors(attribute.g)


def _write(tensors: Iterable[TensorProto], file: Path, location: str) -> list[TensorProto]:
    """Write the large tensors' bytes one after the other; all tensors, those pointing into `location`."""
    written = []
    with file.open("wb") as stream:
        for tensor in tensors:
            if len(tensor.raw_data) < _SMALLEST_EXTERNAL:
                written.append(tensor)
                continue
            external = TensorProto(
                name=tensor.name,
                data_type=tensor.data_type,
                dims=tensor.dims,
                data_location=TensorProto.EXTERNAL,
            )
            for key, value in ((_LOCATION, location), ("offset", stream.tell()), (_LENGTH, len(tensor.raw_data))):
                external.external_data.add(key=key, value=str(value))
            stream.write(tensor.raw_data)
            written.append(external)
    return written


def with_initializers(model: onnx.ModelProto, initializers: Sequence[TensorProto]) -> onnx.ModelProto:
    """The model with these initializers in place of its own, of which nothing is copied."""
    graph = helper.make_graph(
        list(model.graph.node),
        model.graph.name,
        list(model.graph.input),
        list(model.graph.output),
        list(initializers),
        value_info=list(model.graph.value_info),
    )
    result = helper.make_model(
        graph,
        functions=list(model.functions),
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
    )
    result.metadata_props.extend(model.metadata_props)
    return result


def checksum_of(path: Path) -> str:
    """SHA-256 of a file, and of its `data_path` where it has one."""
    data = data_path(path)
    own = sha256_of(path)
    return hashlib.sha256(f"{own}{sha256_of(data)}".encode()).hexdigest() if data.is_file() else own


def total_bytes(path: Path) -> int:
    """Size of an ONNX file and of the files that its weights are in. Raises `InputError` where one is missing."""
    try:
        model = onnx.load(path, load_external_data=False)
        return sum(file.stat().st_size for file in (path, *external_files(model, path)))
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror}; {path} needs it") from error
