"""Bisecting an engine, top to bottom: its boundaries, then its blocks one by one, then a block's layers in FP32.

An engine is looked into through a second one, built of the same graph with the boundaries as outputs. It runs free,
once. Each block is then computed by ONNX Runtime on the inputs that the engine itself gave it, so each is judged alone.
The device runs two engines and nothing else; the search is on the machine that exported.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from exporter.bisect.boundary_graph import block_variants, boundary_of, in_fp32_name, with_boundaries
from exporter.bisect.device_run import DeviceRun
from exporter.bisect.engine_findings import EngineFindings, LayerTrials
from exporter.bisect.free_run import FreeRow, judged
from exporter.bisect.look import blocks_and_end, run_between_boundaries
from exporter.bisect.recording import check_recording, checksums_path
from exporter.bisect.suspect import Suspect, open_suspect
from exporter.bisect.trial import Effect, Trial
from exporter.device.acceptance import MOST_ASKED_DB
from exporter.errors import EnvironmentLacksError, FidelityError, InputError
from exporter.gate.records import OUTPUT, Reference
from exporter.gate.runs import Arrays, compare_snr, load_recorded
from exporter.gate.subgraphs import CutError
from exporter.gate.table import GateRow, bounded_db
from exporter.gate.whole import block_thresholds, model_feeds
from exporter.onnx_files import checksum_of, read_model
from exporter.origin import Origin
from exporter.progress import NullProgress, Progress
from exporter.targets import SUFFIXES

Array: TypeAlias = npt.NDArray[np.generic]

_HOW = "one run with all boundaries as outputs"
# The device's: boundaries, then layers.
_ROUNDS = 2
_STEPS = 3


@dataclass(frozen=True)
class EngineSuspect:
    """`graph`: what stands for the engine in ONNX Runtime, with its reference; `lowered`: what the engine is made of;
    `folder`: where what goes to the device is written."""

    path: Path
    graph: Suspect
    lowered: Path
    folder: Path
    notes: tuple[str, ...]

    def device_run(self, name: str) -> DeviceRun:
        """One run of an engine that is made for looking."""
        return DeviceRun(self.folder, name, self.graph.target)

    def next_step(self, run: DeviceRun, against: Sequence[Path]) -> str:
        """What to do where the engine's GPU is, and then here."""
        here = ["fp4export", "bisect", str(self.path)]
        if self.path.suffix not in SUFFIXES["tensorrt"]:
            here.append("--engine")
        for outputs in (*against, run.outputs):
            here += ["--against", str(outputs)]
        left = f"{run.outputs.name} and {checksums_path(run.outputs).name}"
        return (
            f"copy {self.folder} to a machine with the GPU of {self.graph.target.name} and run there: "
            f"{shlex.join(['sh', str(run.script)])}; copy {left} back and run here: {shlex.join(here)}"
        )


def bisect_engine(
    path: str | Path, against: Sequence[Path] = (), *, trial: bool = True, progress: Progress | None = None
) -> EngineFindings:
    """Find where the engine in `path`, or the one that is made of the lowered graph in `path`, leaves its graph.

    `against`: what the device's runs left, the boundaries' first, then that of the layers. What is not given is run
    here if the engine's GPU is here. `trial` says whether the layers of a deviating block are put into FP32.

    Raises:
        InputError: `path` leads to no graph with a reference, or `against` is of another export.
        EnvironmentLacksError: the engine's GPU is not here; the message says what to run where it is.
        FidelityError: the graph itself cannot be run.
    """
    if len(against) > _ROUNDS:
        raise InputError(f"{against[-1]}: one of {len(against)} recordings, and there are two: boundaries, then layers")
    progress = progress or NullProgress()
    suspect = _open(Path(path))
    with (
        tempfile.TemporaryDirectory(prefix=".bisect.", dir=suspect.graph.work) as name,
        progress.task(f"bisecting {suspect.path.name}", _STEPS) as task,
    ):
        try:
            recorded = _boundaries(suspect, against, progress)
            task.advance()
            blocks, _ = blocks_and_end(replace(suspect.graph, reference=recorded), suspect.graph.model, Path(name))
            task.advance()
            first = next((row for row in blocks if not row.passed), None)
            layers, notes = None, suspect.notes
            if trial and first is not None and first.kind == "block":
                layers, more = _layers(suspect, recorded, first, against, Path(name), progress)
                notes += more
            task.advance()
        except CutError as error:
            raise FidelityError(f"{path}: {error}") from error
    free = judged(_free_rows(suspect.graph, recorded), recorded.end_to_end_threshold, _HOW)
    return EngineFindings(str(path), suspect.graph.target.name, free, blocks, layers, notes)


def _open(path: Path) -> EngineSuspect:
    notes: tuple[str, ...] = ()
    graph = path
    if path.suffix in SUFFIXES["tensorrt"]:
        if not path.is_file():
            raise InputError(f"{path}: no such file; give an engine that fp4export exported, or a lowered graph")
        origin = Origin.load(path)
        graph = origin.graph
        if checksum_of(path) != origin.output_sha256:
            notes = (f"{path.name} is not the file that was exported (SHA-256 differs): its graph was built anew",)
    suspect = open_suspect(graph)
    target = suspect.target
    if suspect.stage != "lowered" or target.engine == "onnxruntime":
        raise InputError(f"{path}: no engine is made of it; give a .plan, or lowered.TARGET.onnx for a GPU's TARGET")
    lowered = suspect.work / f"lowered.{target.name}.onnx"
    return EngineSuspect(path, suspect, lowered, path.with_suffix(".bisect"), (*notes, *suspect.notes))


def _boundaries(suspect: EngineSuspect, against: Sequence[Path], progress: Progress) -> Reference:
    """The reference with the engine's own boundaries in place of PyTorch's, and limits that a GPU can be held to."""
    reference = suspect.graph.reference
    limits = {name: min(limit, MOST_ASKED_DB) for name, limit in reference.thresholds.items()}
    end_limit = min(reference.end_to_end_threshold, MOST_ASKED_DB)
    names = list(block_thresholds(suspect.graph.model, reference))
    run = suspect.device_run("boundaries")
    if not against:
        model = with_boundaries(read_model(suspect.lowered), names)
        feeds = [dict(model.inputs) for model in reference.models]
        run.prepare(model, feeds, suspect.lowered, progress)
        if not run.runs_here:
            raise EnvironmentLacksError(
                f"{suspect.path}: runs on its own GPU only; {suspect.next_step(run, ())}; its graph alone can be "
                f"bisected here: {shlex.join(['fp4export', 'bisect', str(suspect.graph.path)])}"
            )
        run.run()
    example = {name: np.asarray(reference.models[0].boundaries[name]) for name in names}
    outputs = _recorded(suspect, run, against[:1], example, len(reference.models))
    models = tuple(
        replace(model, boundaries={**model.boundaries, **found})
        for model, found in zip(reference.models, outputs, strict=True)
    )
    return replace(reference, models=models, thresholds=limits, end_to_end_threshold=end_limit)


def _recorded(
    suspect: EngineSuspect, run: DeviceRun, against: Sequence[Path], example: Mapping[str, Array], count: int
) -> list[Arrays]:
    """The device's outputs, `against` or those of a run here, which go; named and typed as `example`.

    Raises `InputError` for those of another graph.
    """
    path = against[0] if against else run.outputs
    check_recording(path, checksum_of(suspect.lowered))
    outputs = [{boundary_of(name): array for name, array in output.items()} for output in load_recorded(path)]
    if len(outputs) != count:
        raise InputError(f"{path}: has outputs of {len(outputs)} inputs, and {count} were saved; record them again")
    for output in outputs:
        for name, like in example.items():
            found = list(output[name].shape) if name in output else "missing"
            if found != list(like.shape):
                raise InputError(f"{path}: {name} is {found}, not {list(like.shape)}; it is of another engine")
    if not against:
        run.forget()
    return [{name: output[name].astype(like.dtype) for name, like in example.items()} for output in outputs]


def _free_rows(suspect: Suspect, recorded: Reference) -> tuple[FreeRow, ...]:
    names = [*(f"{block}.output" for block in recorded.blocks), OUTPUT]
    torch, engine = (
        [{name: np.asarray(model.boundaries[name]) for name in names} for model in reference.models]
        for reference in (suspect.reference, recorded)
    )
    found = compare_snr(torch, engine)
    return tuple(FreeRow(name, bounded_db(found.get(name, np.nan))) for name in names)


def _layers(
    suspect: EngineSuspect,
    recorded: Reference,
    block: GateRow,
    against: Sequence[Path],
    folder: Path,
    progress: Progress,
) -> tuple[LayerTrials | None, tuple[str, ...]]:
    """The block's layers in FP32, one by one, on the inputs that the engine gave it; or why they were not tried.
    Files that are of no use afterwards go to `folder`."""
    feeds = model_feeds(recorded)
    run = suspect.device_run("layers")
    try:
        model = block_variants(suspect.graph, read_model(suspect.lowered), block.name, feeds[0])
        if len(against) < _ROUNDS:
            run.prepare(model, feeds, suspect.lowered, progress)
            if not run.runs_here:
                return None, (f"to try the layers of {block.name} in FP32, {suspect.next_step(run, against)}",)
            run.run()
    except (InputError, EnvironmentLacksError) as error:
        return None, (f"{block.name}: its layers were not tried in FP32: {error}",)
    wanted = f"{block.name}.output"
    given = replace(suspect.graph, reference=recorded)
    expected = [found[wanted] for found in run_between_boundaries(given, given.model, [wanted], folder / "block.onnx")]
    outputs = [value.name for value in model.graph.output]
    found = _recorded(suspect, run, against[1:], dict.fromkeys(outputs, expected[0]), len(feeds))
    snr = {name: _snr(expected, [output[name] for output in found]) for name in outputs}
    return _trials(suspect.graph, block, snr), ()


def _snr(expected: Sequence[Array], found: Sequence[Array]) -> float:
    one, other = ([{OUTPUT: array} for array in arrays] for arrays in (expected, found))
    return bounded_db(compare_snr(one, other).get(OUTPUT, np.nan))


def _trials(suspect: Suspect, block: GateRow, snr: Mapping[str, float]) -> LayerTrials:
    alone = snr[f"{block.name}.output"]
    layers = [entry.layer for entry in suspect.layers if entry.layer.startswith(f"{block.name}.")]
    tried = [*((layer, (layer,)) for layer in layers), (block.name, tuple(layers))]
    trials = []
    for what, changed in tried:
        after = snr[in_fp32_name(what)]
        effect = Effect(block.name, alone, after, block.threshold_db)
        trials.append(Trial(changed, (effect,), goes_away=after >= block.threshold_db))
    return LayerTrials(alone, block.threshold_db, tuple(trials))
