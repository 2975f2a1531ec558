"""Running and comparing through polygraphy, and the command line that does the same again."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from exporter.errors import FidelityError, InputError
from exporter.files import atomic_path
from exporter.memory import return_freed_memory
from exporter.runtime.arena import share_arena

if TYPE_CHECKING:
    from polygraphy.comparator import IterationResult, RunResults

Arrays: TypeAlias = dict[str, npt.NDArray[np.generic]]

REFERENCE_NAME = "torch"
# Fusions of quantize-dequantize pairs would replace the operators that a GPU engine gets.
UNOPTIMIZED = "ORT_DISABLE_ALL"
_SMALLEST_GIVEN = 1024


def refusals() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a graph or an input that it cannot take; they have no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidGraph", "InvalidArgument", "InvalidProtobuf", "NotImplemented", "NoSuchFile")
    return tuple(getattr(state, name) for name in (*names, "RuntimeException", "EPFail"))


@dataclass(frozen=True)
class Part:
    """A part of a graph: a model that lacks the `constants`, by the names under which its nodes read them.

    `threads` is how many an operator may use, None for as many as there are cores.
    """

    model: onnx.ModelProto
    constants: Mapping[str, npt.NDArray[np.generic]]
    threads: int | None = None

    def complete(self) -> onnx.ModelProto:
        """The model with the constants in it."""
        return self._with([numpy_helper.from_array(array, name) for name, array in self.constants.items()])

    def session(self, *, optimized: bool) -> ort.InferenceSession:
        """ONNX Runtime's session, whose inputs the `large` constants are.

        As constants of the session they would be copied into its memory, which takes as long as many a run.
        """
        options = ort.SessionOptions()
        # Nothing is laid out anew for its kernels, which pays only after many runs.
        options.add_session_config_entry("session.disable_prepacking", "1")
        if optimized:
            # Without fusions a run takes several times as much, most of which an arena would keep.
            share_arena(options)
        # The next segment's constants are computed meanwhile, on a core that threads would only wait on.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if not optimized:
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, UNOPTIMIZED)
        large = self.large
        model = self._with(
            [numpy_helper.from_array(array, name) for name, array in self.constants.items() if name not in large]
        )
        model.graph.input.extend(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in large.items()
        )
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    @property
    def large(self) -> Arrays:
        """The constants that a session is given in every run. The small ones are in its model, since ONNX Runtime reads
        some while it infers shapes and fuses operators."""
        return {name: array for name, array in self.constants.items() if array.nbytes >= _SMALLEST_GIVEN}

    def _with(self, constants: Sequence[onnx.TensorProto]) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        model.graph.initializer.extend(constants)
        return model


def run_graph(path: Path, feeds: Sequence[Arrays], *, optimized: bool, part: Part | None = None) -> list[Arrays]:
    """Run the ONNX file in ONNX Runtime on every feed; `optimized` is False where its fusions must stay out.
    With `part`, a part of the file's graph runs in its place.

    Returns one mapping of output name to array per feed; FP8 outputs are uint8 bytes.

    Raises:
        FidelityError: ONNX Runtime cannot load or run the file.
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator

    with quiet():
        try:
            if part is None:
                session = SessionFromOnnx(str(path), graph_optimization_level=_level(optimized))()
            else:
                session = part.session(optimized=optimized)
                feeds = [{**feed, **part.large} for feed in feeds]
            _check_inputs(path, {value.name for value in session.get_inputs()}, feeds[0])
            results = Comparator.run([OnnxrtRunner(session, name="onnxruntime")], data_loader=list(feeds))
        except refusals() as error:
            reason = str(error).strip().splitlines()[0]
            raise FidelityError(f"{path}: ONNX Runtime cannot run this graph: {reason}") from error
    del session
    return_freed_memory()
    return [dict(iteration.items()) for iteration in results["onnxruntime"]]


def _check_inputs(path: Path, wanted: set[str], feed: Arrays) -> None:
    """polygraphy would guess which other array might be meant."""
    missing = sorted(wanted - feed.keys())
    if missing:
        raise FidelityError(f"{path}: the graph has an input {missing[0]!r} that the reference does not have")


def compare_snr(
    reference: Sequence[Arrays], outputs: Sequence[Arrays], kept_rows: Mapping[str, npt.NDArray[np.bool_]] | None = None
) -> dict[str, float]:
    """Each reference output's worst SNR in dB over the iterations (NaN where one is NaN), by polygraphy's comparator.

    `kept_rows` [R] drops rows (next-to-last axis) of the outputs that it names before they are compared; an output
    without any row left is NaN.
    """
    from polygraphy.comparator import Comparator, RunResults, SnrCompareFunc

    kept_rows = kept_rows or {}
    empty = {name for name, rows in kept_rows.items() if not rows.any()}
    worst = dict.fromkeys(empty, float("nan"))
    results = RunResults()
    for runner, iterations in ((REFERENCE_NAME, reference), ("onnxruntime", outputs)):
        given = [{name: array for name, array in arrays.items() if name not in empty} for arrays in iterations]
        results.add(given, runner_name=runner)
    if not any(results[REFERENCE_NAME]):
        return worst
    with quiet():
        results = Comparator.postprocess(results, _RowFilter(kept_rows))
        # Not through Comparator.compare_accuracy, which takes quantiles of every tensor for its log.
        compare = SnrCompareFunc()
        pairs = zip(results[REFERENCE_NAME], results["onnxruntime"], strict=True)
        verdicts = [compare(expected, found) for expected, found in pairs]
    for iteration in verdicts:
        for name, verdict in iteration.items():
            # A bare False stands for shapes that differ; np.minimum keeps a NaN.
            snr = float("nan") if isinstance(verdict, bool) else float(verdict.snr)
            worst[name] = float(np.minimum(worst.get(name, np.inf), snr))
    return worst


@dataclass(frozen=True)
class _RowFilter:
    kept: Mapping[str, npt.NDArray[np.bool_]]

    def __call__(self, iteration: IterationResult) -> IterationResult:
        for name, rows in self.kept.items():
            if name in iteration:
                iteration[name] = np.compress(rows, iteration[name], axis=-2)
        return iteration


def save_feeds(feeds: Sequence[Arrays], path: Path) -> None:
    """Write inputs as polygraphy's JSON, for `--load-inputs`."""
    _save_json([dict(feed) for feed in feeds], path)


def save_reference(outputs: Sequence[Arrays], path: Path) -> None:
    """Write reference outputs as polygraphy's JSON, for `--load-outputs`."""
    _save_json(_run_results(outputs), path)


def _save_json(content: object, path: Path) -> None:
    """What polygraphy's `save_json` writes, array by array: a large model's would be half a gigabyte of text."""
    from polygraphy.json import Encoder

    with quiet(), atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, cls=Encoder)


def load_feeds(path: Path) -> list[Arrays]:
    """Read what `save_feeds` wrote. Raises `InputError` for anything else."""
    from polygraphy.json import load_json

    feeds = _loaded(load_json, path)
    if not isinstance(feeds, list) or not all(isinstance(feed, dict) for feed in feeds):
        raise InputError(f"{path}: not a list of inputs as polygraphy writes it")
    return [dict(feed) for feed in feeds]


def load_reference(path: Path) -> list[Arrays]:
    """Read what `save_reference` wrote. Raises `InputError` for anything else."""
    from polygraphy.comparator import RunResults

    results = _loaded(RunResults.load, path)
    if not isinstance(results, RunResults) or REFERENCE_NAME not in results:
        raise InputError(f"{path}: not the reference's outputs as polygraphy writes them")
    return [dict(iteration.items()) for iteration in results[REFERENCE_NAME]]


def load_recorded(path: Path) -> list[Arrays]:
    """Read what `polygraphy run --save-outputs` wrote of one runner. Raises `InputError` for anything else."""
    from polygraphy.comparator import RunResults

    results = _loaded(RunResults.load, path)
    if not isinstance(results, RunResults) or len(results) != 1:
        raise InputError(f"{path}: not the outputs of one engine as polygraphy writes them")
    ((_, iterations),) = results.items()
    return [dict(iteration.items()) for iteration in iterations]


def _loaded(load: Callable[[str], object], path: Path) -> object:
    from polygraphy.exception import PolygraphyException

    try:
        with quiet():
            return load(str(path))
    except (PolygraphyException, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as polygraphy's JSON: {error}") from error


def _run_results(outputs: Sequence[Arrays]) -> RunResults:
    from polygraphy.comparator import RunResults

    results = RunResults()
    results.add([dict(output) for output in outputs], runner_name=REFERENCE_NAME)
    return results


def repeat_command(
    graph: Path, feeds: Path, reference: Path, thresholds: Mapping[str, float], *, default_db: float, optimized: bool
) -> str:
    """The `polygraphy run` line that repeats a comparison; `thresholds` are those that differ from `default_db`."""
    # Rounded down, so that what passed here passes there.
    limits = [f"{math.floor(default_db * 10) / 10:g}"]
    limits += [f"{name}:{math.floor(limit * 10) / 10:g}" for name, limit in thresholds.items()]
    level = [] if optimized else ["--graph-optimization-level", UNOPTIMIZED]
    words = ["polygraphy", "run", str(graph), "--onnxrt", *level, "--load-inputs", str(feeds)]
    words += ["--load-outputs", str(reference), "--compare", "snr", "--snr-threshold", *limits]
    return shlex.join(words)


def _level(optimized: bool) -> object:
    return None if optimized else getattr(ort.GraphOptimizationLevel, UNOPTIMIZED)


def quiet() -> AbstractContextManager[object]:
    """Silence polygraphy's log: the gate prints its own table.

    The log is the process's own: what runs in several threads is silenced around them. That also imports all that is
    taken of polygraphy here, whose modules fail at random when two threads import them at once.
    """
    import polygraphy.backend.onnxrt
    import polygraphy.comparator
    import polygraphy.cuda  # noqa: F401 - all of it, for the threads
    from polygraphy.json import to_json
    from polygraphy.logger import G_LOGGER

    # Makes arrays known to its JSON, which two threads may not do at once either.
    to_json([])

    quiet: AbstractContextManager[object] = G_LOGGER.verbosity(G_LOGGER.CRITICAL)
    return quiet
