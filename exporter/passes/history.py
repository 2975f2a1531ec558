"""What the passes did to a graph, kept in its metadata, so that any graph or output can tell later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import onnx

from exporter.errors import InputError

PASSES_KEY = "fp4export.passes"
IMPORTED = "imported"
"""The first entry's name: the graph as it came, its constants made initializers, before any pass."""


@dataclass(frozen=True)
class PassResult:
    """One pass that ran: its name, how many places it changed, and how many nodes the graph has after it."""

    name: str
    changed: int
    nodes: int


def write_pass_history(model: onnx.ModelProto, history: Sequence[PassResult]) -> None:
    """Put the history into the model's metadata, in place of what was there."""
    kept = {entry.key: entry.value for entry in model.metadata_props}
    kept[PASSES_KEY] = json.dumps([asdict(result) for result in history])
    onnx.helper.set_model_props(model, kept)


def read_pass_history(model: onnx.ModelProto) -> tuple[PassResult, ...]:
    """The history in a model's metadata; empty for a model that has none. Raises `InputError` for a damaged one."""
    text = next((entry.value for entry in model.metadata_props if entry.key == PASSES_KEY), "[]")
    names = {field.name for field in fields(PassResult)}
    try:
        rows = json.loads(text)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) == names for row in rows):
            raise ValueError(f"it must be a list, every row with the fields {', '.join(sorted(names))}")
    except ValueError as error:
        raise InputError(
            f"the ONNX file's metadata {PASSES_KEY} is damaged: {error}; export the model again"
        ) from error
    return tuple(PassResult(**row) for row in rows)
