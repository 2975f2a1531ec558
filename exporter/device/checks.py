"""What is asked of a finished engine, on the GPU that it is for: that it loads, has the layers that were planned, and
computes what the gate's reference did."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exporter.device.acceptance import Acceptance, find_acceptance
from exporter.device.child import WorkerError, run_worker
from exporter.device.engine_layers import check_layers
from exporter.device.graph import LoweredGraph
from exporter.device.jobs import EngineCheck
from exporter.errors import FidelityError
from exporter.files import atomic_path
from exporter.gpu import local_gpu
from exporter.targets import Target

if TYPE_CHECKING:
    from exporter.progress import Progress

_MOST_NAMED = 3


@dataclass(frozen=True)
class Check:
    """One thing that was asked of the engine; `detail` says what was found, or why it was not asked."""

    name: str
    state: Literal["passed", "failed", "not run"]
    detail: str

    def sentence(self) -> str:
        """One line for the terminal."""
        return f"{self.name}: {self.state}{': ' if self.detail else ''}{self.detail}"


def gate_folder(graph: LoweredGraph, folder: Path | None) -> Path:
    """Where the gate's saved inputs and outputs of this graph are: in `folder`, if any, else beside it."""
    return folder or graph.path.parent / f"gate.{graph.lowered_for.name}"


def check_engine(
    graph: LoweredGraph,
    engine: Path,
    output: Path,
    target: Target,
    progress: Progress,
    gate: Path | None = None,
    *,
    acceptance: bool = True,
) -> tuple[Check, ...]:
    """Load the engine in a fresh process, hold its layers against the graph's table, and compare its outputs.

    `engine` is the file as it stands, `output` the one that it is going to be; `acceptance` asks for the comparison
    with what `gate_folder(graph, gate)` has.
    """
    rtx = target.engine == "tensorrt-rtx"
    gpu = local_gpu()
    names = ("loaded in a fresh process", "quantized layers", "acceptance")
    if gpu is None or gpu.compute_capability != target.compute_capability:
        here = "no GPU here" if gpu is None else f"the GPU here is {gpu.name}"
        return tuple(Check(name, "not run", f"{here}, and the engine is for {target.name}") for name in names)
    layers_file = output.with_name(output.stem + ".layers.json")
    try:
        with atomic_path(layers_file) as temporary:
            check = EngineCheck(str(engine), rtx, layers=str(temporary))
            run_worker("load", check, f"loading for {target.name}", progress)
    except WorkerError as error:
        return (Check(names[0], "failed", str(error)), *(Check(name, "not run", "") for name in names[1:]))
    layers = _layers_check(graph, layers_file)
    saved = gate_folder(graph, gate)
    return (
        Check(names[0], "passed", ""),
        layers,
        _acceptance_check(engine, output, saved, progress, rtx=rtx, wanted=acceptance),
    )


def _layers_check(graph: LoweredGraph, layers_file: Path) -> Check:
    verdicts = check_layers(graph, layers_file.read_text(encoding="utf-8"))
    wrong = [verdict for verdict in verdicts if verdict.state == "wrong"]
    hidden = [verdict.layer for verdict in verdicts if verdict.state == "not visible"]
    if wrong:
        named = "; ".join(f"{v.layer} is planned as {v.expected} and reads {v.found}" for v in wrong[:_MOST_NAMED])
        return Check("quantized layers", "failed", f"{len(wrong)} of {len(verdicts)}: {named} (see {layers_file})")
    if hidden and len(hidden) == len(verdicts):
        return Check("quantized layers", "not run", f"TensorRT's inspector names none of the {len(verdicts)} layers")
    seen = f"{len(verdicts) - len(hidden)} of {len(verdicts)} are as planned"
    unseen = f", the inspector does not name {', '.join(hidden[:_MOST_NAMED])}" if hidden else ""
    return Check("quantized layers", "passed", seen + unseen)


def _acceptance_check(engine: Path, output: Path, gate: Path, progress: Progress, *, rtx: bool, wanted: bool) -> Check:
    if not wanted:
        return Check("acceptance", "not run", "--no-acceptance")
    saved: Acceptance | None = find_acceptance(gate)
    if saved is None:
        return Check("acceptance", "not run", f"{gate} has no saved inputs and outputs")
    repeat = f"repeat: {saved.command(output, rtx=rtx)}"
    try:
        check = EngineCheck(str(engine), rtx, inputs=str(saved.inputs), outputs=str(saved.outputs))
        result = run_worker("compare", check, "comparing with the reference", progress)
    except WorkerError as error:
        return Check("acceptance", "failed", f"{error}; {repeat}")
    worst_name, worst = min(result["snr"].items(), key=lambda item: -math.inf if math.isnan(item[1]) else item[1])
    passed = worst >= saved.least_db
    found = f"SNR of {worst_name} {worst:.1f} dB, at least {saved.least_db:.1f} dB needed; {repeat}"
    return Check("acceptance", "passed" if passed else "failed", found)


def refuse_failed(checks: tuple[Check, ...], engine: Path, output: Path) -> None:
    """Raise `FidelityError` for the first check that failed; the engine is kept under another name."""
    failed = next((check for check in checks if check.state == "failed"), None)
    if failed is None:
        return
    rejected = output.with_name(f"{output.stem}.rejected{output.suffix}")
    os.replace(engine, rejected)
    raise FidelityError(f"{failed.sentence()}; the engine is kept as {rejected}")
