"""How large the numbers are that FP16 would have to hold: found on the calibration inputs, in FP32."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from exporter.calibration.capture import CalibrationSet
from exporter.compute import COMPUTE_TYPES, wider_than
from exporter.errors import InputError
from exporter.files import scratch_folder, write_text_atomically
from exporter.gate.segments import SegmentedSession, is_large
from exporter.job import Job
from exporter.onnx_files import read_model, save_onnx
from exporter.passes.compute_type import AMAX_PREFIX, probe_amax
from exporter.passes.driver import run_passes
from exporter.passes.layer_table import read_layer_table
from exporter.passes.surgery import has_given_name
from exporter.runtime import OnnxSession
from exporter.source import Source
from exporter.stage_files import weights_file
from exporter.targets import Target
from exporter.workdir import key_of

# Inputs that calibration has not seen may be larger.
HEADROOM = 2.0

_BATCH = 8


@dataclass(frozen=True)
class Amax:
    """The largest magnitude of one tensor, and the tensor's place in the graph, in words."""

    tensor: str
    place: str
    value: float


def checked_ranges(job: Job, source: Source, captured: CalibrationSet, exported: Path) -> tuple[Amax, ...]:
    """`measured_ranges`, all of which FP16 holds.

    Raises `InputError` naming the first tensor that comes within `HEADROOM` of FP16's largest number.
    """
    found = measured_ranges(job, source, captured, exported)
    largest = check_amax(job.recipe.name, found, job.target)
    job.progress.note(f"fp16 holds the calibration inputs' numbers: at most {largest.value:.4g}, at {largest.place}")
    return found


def measured_ranges(job: Job, source: Source, captured: CalibrationSet, exported: Path) -> tuple[Amax, ...]:
    """`measure_amax` over all captured inputs, sealed in the work folder."""

    def make(path: Path) -> None:
        with job.progress.task("measuring ranges", len(captured)) as task:

            def feeds() -> Iterator[Mapping[str, npt.NDArray[Any]]]:
                for start in range(0, len(captured), _BATCH):
                    rows = torch.arange(start, min(start + _BATCH, len(captured)))
                    inputs = captured.inputs(rows, source.prompts)
                    yield source.adapter.with_conditions(source.model, inputs).as_numpy()
                    task.advance(len(rows))

            blocks = [name for name, _ in source.adapter.blocks(source.model)]
            found = measure_amax(exported, job.target, feeds(), blocks)
        write_text_atomically(path, json.dumps([asdict(one) for one in found], indent=1) + "\n")

    key = key_of(stage="ranges", calibrated=weights_file(job, source).key, target=job.target.name)
    path, _ = job.work.obtain(f"ranges.{job.target.name}.json", key, make)
    return tuple(Amax(**entry) for entry in json.loads(path.read_text(encoding="utf-8")))


def measure_amax(
    exported: Path, target: Target, feeds: Iterable[Mapping[str, npt.NDArray[Any]]], blocks: Sequence[str] = ()
) -> tuple[Amax, ...]:
    """The largest magnitude of every tensor that FP16 would store, in the graph's order, over all `feeds`.

    NaN where one is. The graph itself reduces its tensors, so none of them is held. A large graph runs segment by
    segment, `blocks` being the paths of its blocks.
    """
    plain = read_model(exported)
    model = run_passes(plain, (probe_amax,), target)[0]
    probes = [value.name for value in model.graph.output]
    with scratch_folder(exported.parent) as folder:
        session = _probed_session(model, blocks, folder / "probed.onnx")
        highest = np.zeros(len(probes), np.float32)
        for feed in feeds:
            found = session.run({value.name: feed[value.name] for value in model.graph.input})
            highest = np.maximum(highest, np.stack([found[probe] for probe in probes]))
    producers = {name: node for node in plain.graph.node for name in node.output}
    names = [probe.removeprefix(AMAX_PREFIX) for probe in probes]
    return tuple(Amax(name, _place(name, producers), float(amax)) for name, amax in zip(names, highest, strict=True))


def _probed_session(model: onnx.ModelProto, blocks: Sequence[str], path: Path) -> OnnxSession | SegmentedSession:
    """A small graph is written to `path`, from where ONNX Runtime reads it."""
    if blocks and is_large(read_layer_table(model)):
        probes = {value.name: value.name.removeprefix(AMAX_PREFIX) for value in model.graph.output}
        return SegmentedSession(model, blocks, probes=probes)
    save_onnx(model, path)
    return OnnxSession(path)


def check_amax(recipe: str, found: Iterable[Amax], target: Target) -> Amax:
    """The largest of them. Raises `InputError` naming the first that FP16 does not hold with `HEADROOM` to spare."""
    largest = COMPUTE_TYPES["fp16"].largest
    every = list(found)
    for one in every:
        if not one.value <= largest / HEADROOM:
            raise InputError(
                f"{recipe}: compute: fp16: {one.place} reaches {one.value:.4g} on the calibration inputs, which leaves "
                f"no factor of {HEADROOM:g} to FP16's largest number {largest:g}; "
                f"{wider_than('fp16', target)}"
            )
    return max(every, key=lambda one: one.value)


def _place(name: str, producers: Mapping[str, onnx.NodeProto]) -> str:
    """The tensor's own name if it is a layer's or a block's, else its operator and the nearest such name before it."""
    if has_given_name(name) or name not in producers:
        return name
    front, seen = [name], {name}
    while front:
        before = [source for one in front if one in producers for source in producers[one].input]
        named = next((source for source in before if has_given_name(source)), None)
        if named is not None:
            return f"{producers[name].op_type} {name!r} after {named}"
        front = [source for source in dict.fromkeys(before) if source not in seen]
        seen.update(front)
    return f"{producers[name].op_type} {name!r} before the blocks"
