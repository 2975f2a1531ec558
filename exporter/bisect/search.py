"""The bisection, top to bottom: free-running, then block by block, then layer by layer, then the layer in FP32."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from exporter.bisect.findings import Findings
from exporter.bisect.free_run import run_free
from exporter.bisect.look import Look, look_at
from exporter.bisect.parts import Part, find_part
from exporter.bisect.suspect import Suspect, open_suspect
from exporter.bisect.trial import Effect, Trial, in_fp32
from exporter.errors import FidelityError, InputError
from exporter.gate.linears import compare_linears
from exporter.gate.subgraphs import CutError
from exporter.gate.table import GateRow
from exporter.progress import NullProgress, Progress

_STEPS = 4


def bisect(path: str | Path, *, trial: bool = True, progress: Progress | None = None) -> Findings:
    """Find where the graph in `path` leaves its reference; `trial` says whether deviating layers are tried in FP32.

    Nothing that the export left is changed. Raises as `open_suspect`, and `FidelityError` for a graph that cannot be
    run or has other layers than the reference.
    """
    suspect = open_suspect(Path(path))
    with (
        tempfile.TemporaryDirectory(prefix=".bisect.", dir=suspect.work) as name,
        (progress or NullProgress()).task(f"bisecting {suspect.path.name}", _STEPS) as task,
    ):
        folder = Path(name)
        try:
            free = run_free(suspect, folder)
            task.advance()
            look = look_at(suspect, suspect.model, folder)
            task.advance()
            linears = _linears(suspect, folder)
            task.advance()
            guilty = tuple(row.name for row in linears if not row.passed)
            trials, part, notes = _tried(suspect, guilty, look, folder) if trial else ((), None, ())
            if not guilty:
                part = find_part(suspect, suspect.model, look)
            task.advance()
        except CutError as error:
            raise FidelityError(f"{path}: {error}") from error
    return Findings(
        file=str(path),
        stage=suspect.stage,
        target=suspect.target.name,
        free=free,
        look=look,
        linears=linears,
        place=_place(look, guilty),
        part=part,
        trials=trials,
        notes=(*suspect.notes, *notes),
    )


def _linears(suspect: Suspect, folder: Path) -> tuple[GateRow, ...]:
    records = {record.layer: record for record in suspect.reference.linears}
    found = compare_linears(
        suspect.model,
        suspect.layers,
        records,
        suspect.stage,
        folder / "linears.onnx",
        optimized=suspect.optimized,
    )
    return found.rows


def _place(look: Look, guilty: Sequence[str]) -> str:
    """The first place where something deviates; a linear outside all blocks is its own."""
    inside = {row.block for row in look.inputs if not row.passed}
    for row in look.blocks:
        if not row.passed or row.name in inside or any(layer.startswith(f"{row.name}.") for layer in guilty):
            return row.name
    return guilty[0] if guilty else ""


def _tried(
    suspect: Suspect, guilty: Sequence[str], before: Look, folder: Path
) -> tuple[tuple[Trial, ...], Part | None, tuple[str, ...]]:
    """The first guilty layer in FP32, then all of them if that does not do; which operators are left; remarks."""
    trials: list[Trial] = []
    part = None
    for layers in dict.fromkeys((tuple(guilty[:1]), tuple(guilty))):
        if not layers:
            continue
        try:
            model = in_fp32(suspect, layers)
        except InputError as error:
            return tuple(trials), part, (f"not tried in FP32: {error}",)
        after = look_at(suspect, model, folder)
        trials.append(Trial(layers, _effects(before, after), after.right and len(layers) == len(guilty)))
        part = find_part(suspect, model, after) if len(layers) == len(guilty) else None
    return tuple(trials), part, ()


def _effects(before: Look, after: Look) -> tuple[Effect, ...]:
    """The blocks, and the output, whose SNR changed."""
    pairs = zip((*before.blocks, before.end_to_end), (*after.blocks, after.end_to_end), strict=True)
    return tuple(
        Effect("end to end" if old.kind == "end_to_end" else old.name, old.snr_db, new.snr_db, new.threshold_db)
        for old, new in pairs
        if old.snr_db != new.snr_db
    )
