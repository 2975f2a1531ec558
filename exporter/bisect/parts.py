"""What lies between quantized linears: found where a block or a layer's input deviates and all linears are right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from exporter.bisect.look import Look
from exporter.bisect.suspect import Suspect
from exporter.gate.entering import InputRow

_MOST_NAMED = 12


@dataclass(frozen=True)
class Part:
    """Operators in `place` between `after`, linears and boundaries that are right, and `before`, a linear's input or a
    boundary.

    `snr_db` is that of what they compute, given the place's inputs, of which `needed_db` is asked. `operators` are
    the types in the graph's order, `nodes` their names, the first few.
    """

    place: str
    before: str
    after: tuple[str, ...]
    snr_db: float
    needed_db: float
    operators: tuple[str, ...]
    nodes: tuple[str, ...]


def find_part(suspect: Suspect, model: onnx.ModelProto, look: Look) -> Part | None:
    """The first operators outside quantized linears that deviate in `model`, which is the suspect's with its guilty
    linears replaced, as `look` saw it; None where none do.

    In a block, those before one of its linears come before those that make its output.
    """
    for row in look.blocks:
        for entering in (one for one in look.inputs if one.block == row.name and not one.passed):
            tensor = next(entry.input for entry in suspect.layers if entry.layer == entering.layer)
            return _between(suspect, model, tensor, entering)
        if not row.passed:
            tensor = f"{row.name}.output" if row.kind == "block" else row.name
            return _between(suspect, model, tensor, InputRow(row.name, tensor, row.snr_db, row.threshold_db))
    return None


def _between(suspect: Suspect, model: onnx.ModelProto, tensor: str, row: InputRow) -> Part:
    """The nodes that `tensor` depends on, back to other linears, boundaries and the graph's inputs."""
    ends = {entry.output: entry.layer for entry in suspect.layers}
    ends |= {boundary: boundary for boundary in suspect.reference.models[0].boundaries}
    ends |= {value.name: value.name for value in model.graph.input}
    makers = {output: node for node in model.graph.node for output in node.output}
    reached: dict[str, None] = {}
    inside: set[str] = set()
    queue = [tensor]
    while queue:
        current = queue.pop(0)
        if current in ends and current != tensor:
            reached[ends[current]] = None
        elif current in makers and current not in inside:
            inside.update(makers[current].output)
            queue += [source for source in makers[current].input if source]
    nodes = [node for node in model.graph.node if inside.intersection(node.output)]
    order = list(ends.values())
    return Part(
        place=row.block,
        before=row.layer,
        after=tuple(sorted(reached, key=order.index)),
        snr_db=row.snr_db,
        needed_db=row.needed_db,
        operators=_types(nodes),
        nodes=tuple(node.name for node in nodes[:_MOST_NAMED]),
    )


def _types(nodes: Iterable[onnx.NodeProto]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(node.op_type for node in nodes))
