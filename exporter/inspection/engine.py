"""What can be told of an engine on a machine without its GPU: its header, and the graph that it was built from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.device.rtx_file import check_rtx_engine, read_rtx_header
from exporter.errors import InputError
from exporter.onnx_files import checksum_of
from exporter.origin import Origin, origin_path
from exporter.passes.emulate import relation_to_engine


@dataclass(frozen=True)
class EngineView:
    """An engine's header in words, the graph that stands for it (None without an origin), and how that is known."""

    header: str
    graph: Path | None
    note: str


def look_at_engine(path: Path) -> EngineView:
    """Read the header and follow OUT.origin.json.

    Raises `InputError` for a damaged engine, one that is not what its origin says, and a graph that has changed.
    """
    header = _header(path)
    if not origin_path(path).is_file():
        note = f"an engine cannot be looked into without its GPU, and there is no {origin_path(path).name} beside it"
        return EngineView(header, None, f"{note}, so its layers are unknown")
    origin = Origin.read(path)
    if checksum_of(path) != origin.output_sha256:
        raise InputError(f"{path}: {origin_path(path).name} is about another engine (SHA-256 differs); export again")
    if not origin.graph.is_file() or checksum_of(origin.graph) != origin.compared_sha256:
        raise InputError(f"{path}: {origin.graph}, which it was built from, is gone or has changed; export again")
    return EngineView(
        header,
        origin.graph,
        f"an engine cannot be looked into without its GPU: this is {origin.graph.name}, "
        f"{relation_to_engine(origin.graph)} (both SHA-256 as recorded); sizes are this graph's",
    )


def _header(path: Path) -> str:
    header = read_rtx_header(path)
    if header is not None:
        check_rtx_engine(path)
        return f"TensorRT-RTX engine, header version {header.version}"
    if origin_path(path).is_file():
        return "not a TensorRT-RTX header"
    raise InputError(
        f"{path}: not a TensorRT-RTX engine, and no {origin_path(path).name} beside it says what else it is"
    )
