"""`fp4export validate NAME.bundle`: every target's graph in ONNX Runtime against the reference in the bundle."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from exporter.bundle.read import AcceptanceFiles, Bundle, TargetFiles
from exporter.errors import FidelityError, InputError
from exporter.gate.records import OUTPUT
from exporter.gate.runs import Arrays, compare_snr, load_feeds, load_reference, run_graph
from exporter.gate.table import bounded_db
from exporter.passes.emulate import runnable_graph
from exporter.progress import Progress
from exporter.targets import get_target


@dataclass(frozen=True)
class Accepted:
    """One target's result: the output's SNR against the reference, and the least that it needs; `passed` or not.

    Both are None for a target that was exported without validation, which passes nothing.
    """

    target: str
    snr_db: float | None
    needed_db: float | None
    passed: bool


def accept_bundle(bundle: Bundle, progress: Progress) -> tuple[Accepted, ...]:
    """Run every target's lowered graph on the acceptance inputs.

    A GPU's graph runs as the gate runs it: on the CPU, in types that ONNX Runtime has. Raises `InputError` where no
    target has acceptance files, and `FidelityError` naming the first target whose output deviates.
    """
    results = []
    with progress.task("validating", len(bundle.manifest.targets)) as task:
        for entry in bundle.manifest.targets:
            results.append(_accept(bundle.target(entry.name)))
            task.advance()
    if all(result.snr_db is None for result in results):
        raise InputError(f"{bundle.root}: was exported without validation, so there is nothing to compare with")
    for result in results:
        if result.snr_db is not None and not result.passed:
            raise FidelityError(
                f"{bundle.root}: target {result.target}: SNR {result.snr_db:.1f} dB, at least {result.needed_db:.1f} "
                "dB needed; `fp4export bisect` on the machine that exported it names the layer"
            )
    return tuple(results)


def acceptance_table(results: tuple[Accepted, ...]) -> Table:
    """One line per target."""
    table = Table(title="acceptance, in ONNX Runtime on this machine", title_justify="left")
    for heading in ("target", "SNR dB", "needed", ""):
        table.add_column(heading, justify="right" if heading in {"SNR dB", "needed"} else "left")
    for result in results:
        if result.snr_db is None or result.needed_db is None:
            table.add_row(escape(result.target), "-", "-", "exported without validation")
        else:
            table.add_row(escape(result.target), f"{result.snr_db:.1f}", f"{result.needed_db:.1f}", "[green]ok[/]")
    return table


def _accept(files: TargetFiles) -> Accepted:
    if files.acceptance is None:
        return Accepted(files.entry.name, None, None, passed=False)
    feeds, expected = _acceptance(files.acceptance)
    with tempfile.TemporaryDirectory() as folder:
        runnable = runnable_graph(files.lowered, get_target(files.entry.name), Path(folder) / files.lowered.name)
        outputs = run_graph(runnable, feeds, optimized=files.entry.engine == "onnxruntime")
    snr = compare_snr(expected, outputs).get(OUTPUT, np.nan)
    needed = files.acceptance.snr_db
    return Accepted(files.entry.name, bounded_db(snr), needed, passed=bool(snr >= needed))


def _acceptance(files: AcceptanceFiles) -> tuple[list[Arrays], list[Arrays]]:
    feeds, expected = load_feeds(files.inputs), load_reference(files.reference)
    if not feeds or len(feeds) != len(expected):
        raise InputError(f"{files.reference}: {len(expected)} outputs for {len(feeds)} inputs; export the bundle again")
    return feeds, expected
