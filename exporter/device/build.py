"""Lowered ONNX → TensorRT engine, checked: the whole of `fp4export build`, and the last stage of an export.

TensorRT works in processes of its own, so that one that crashes loses nothing.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.device.begun import BegunEngine, is_room_beside
from exporter.device.checks import Check, check_engine, gate_folder, refuse_failed
from exporter.device.child import WorkerError, run_worker
from exporter.device.graph import LoweredGraph, read_lowered
from exporter.device.jobs import EngineJob
from exporter.device.memory import estimate_memory
from exporter.device.preflight import check_graph, check_kernels, check_version
from exporter.device.profiles import BatchRange, profile_shapes
from exporter.device.requirements import installed_version, missing_builder
from exporter.device.rtx_file import check_rtx_engine
from exporter.device.sizes import size
from exporter.errors import EnvironmentLacksError, InputError
from exporter.files import atomic_path, scratch_folder, sha256_of
from exporter.gpu import free_memory, local_gpu
from exporter.targets import Target
from plugins.kernels.library import INDEX
from plugins.tensorrt_plugins.releases import OLDEST_TENSORRT

if TYPE_CHECKING:
    from exporter.progress import Progress

CACHE_ENDING = ".timing.cache"
_MOST_NAMED = 3
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built. `workspace`: most bytes of scratch memory, None for TensorRT's own limit;
    `gate`: the folder of saved inputs and outputs, None for the one beside the graph."""

    batch: BatchRange = field(default_factory=BatchRange)
    workspace: int | None = None
    timing_cache: bool = True
    acceptance: bool = True
    gate: Path | None = None


@dataclass(frozen=True)
class EngineInfo:
    """A finished engine: where, for what, how large, built by what, how many seconds were waited for it, and what was
    checked."""

    path: Path
    target: str
    size_bytes: int
    builder: str
    seconds: float
    checks: tuple[Check, ...]


def build_engine(
    lowered: Path,
    output: Path,
    target: Target,
    progress: Progress,
    options: BuildOptions | None = None,
    begun: BegunEngine | None = None,
) -> EngineInfo:
    """Build `lowered` (ONNX in `target`'s own operators) into an engine file, which is written whole or not at all.

    TensorRT-RTX targets are built on any machine, TensorRT targets on the device itself. Dynamic dimensions, which
    are all the batch, range over `options.batch`. Where the engine's GPU is, the engine is loaded in a fresh process,
    inspected and compared with the gate's saved outputs. An engine that is already being built is waited for (`begun`).

    Raises:
        EnvironmentLacksError: the builder, its version or the device is not here; the message has the command to run
            where they are.
        InputError: the graph is not one for this, or the builder refused it; the message names the node.
        FidelityError: a check failed; the engine is then in NAME.rejected.plan.
    """
    options = options or BuildOptions()
    rtx = target.engine == "tensorrt-rtx"
    graph = read_lowered(lowered)
    version = _checked_environment(graph, output, target, options)
    start = time.monotonic()
    cache = timing_cache_path(output, graph.kernels)
    with atomic_path(output) as temporary:
        job = _engine_job(graph, temporary, target, options)
        if begun is None or not begun.is_of(job):
            _check_memory(graph, options, progress)
        # TensorRT-RTX measures nothing when it builds: its timing cache does nothing.
        built = _build(job, cache if options.timing_cache and not rtx else None, target, progress, begun)
        if rtx:
            check_rtx_engine(temporary)
        checks = check_engine(graph, temporary, output, target, progress, options.gate, acceptance=options.acceptance)
        refuse_failed(checks, temporary, output)
    seconds = time.monotonic() - start
    name = f"{'TensorRT-RTX' if rtx else 'TensorRT'} {built or '.'.join(map(str, version))}"
    for check in checks:
        progress.note(check.sentence())
    return EngineInfo(output, target.name, output.stat().st_size, name, seconds, checks)


@contextmanager
def engine_begun(
    lowered: Path, target: Target, folder: Path, options: BuildOptions | None = None
) -> Iterator[BegunEngine | None]:
    """What `build_engine` would build, being built in `folder` by a process beside this one, as long as the body runs.

    None where it would disturb or cannot be: a builder that measures on the GPU or with plugins, too little memory for
    both, and whatever `build_engine` is going to refuse.
    """
    with ExitStack() as stack:
        begun = None
        if target.engine == "tensorrt-rtx" and target.kernels != "plugin":
            with suppress(EnvironmentLacksError, InputError, OSError):
                graph, options = read_lowered(lowered), options or BuildOptions()
                _checked_environment(graph, lowered, target, options)
                if is_room_beside(graph.model):
                    engine = stack.enter_context(scratch_folder(folder)) / "engine.plan"
                    begun = stack.enter_context(BegunEngine(_engine_job(graph, engine, target, options)))
        yield begun


def _engine_job(graph: LoweredGraph, engine: Path, target: Target, options: BuildOptions) -> EngineJob:
    return EngineJob(
        onnx=str(graph.path),
        engine=str(engine),
        rtx=target.engine == "tensorrt-rtx",
        compute_capability=target.compute_capability or (0, 0),
        shapes=profile_shapes(graph.model, options.batch),
        workspace=options.workspace,
        plugins=graph.plugins,
        kernels=str(graph.kernels) if graph.kernels else None,
    )


def timing_cache_path(output: Path, kernels: Path | None = None) -> Path:
    """Where an engine's measurements are kept: NAME.timing.cache beside NAME.plan.

    With plugins NAME.HASH.timing.cache, the hash being that of their kernels: TensorRT knows a plugin's measurements by
    name and shapes alone, so that another release's tactics would be taken for these.
    """
    own = "" if kernels is None else f".{sha256_of(kernels / INDEX)[:12]}"
    return output.with_name(output.stem + own + CACHE_ENDING)


def device_command(lowered: Path, output: Path, target: Target, options: BuildOptions | None = None) -> str:
    """The one command that builds the engine on the device, with numpy, onnx, polygraphy and TensorRT installed."""
    words = ["fp4export", "build", str(lowered), "-o", str(output), "--target", target.name]
    if options is not None and options.batch != BatchRange():
        words += ["--batch", ":".join(map(str, (options.batch.minimum, options.batch.best, options.batch.maximum)))]
    return shlex.join(words)


def _checked_environment(graph: LoweredGraph, output: Path, target: Target, options: BuildOptions) -> tuple[int, int]:
    """The builder's version, once machine and graph fit it."""
    check_kernels(graph, target)
    missing = missing_builder(target)
    if missing:
        if target.engine == "tensorrt-rtx":
            advice = "then run the same command again"
        else:
            advice = f"{_journey(graph, options)}: {device_command(graph.path, output, target, options)}"
        raise EnvironmentLacksError(
            f"target {target.name}: {missing}; the lowered graph is ready: {graph.path}; {advice}"
        )
    version = installed_version(rtx=target.engine == "tensorrt-rtx") or (0, 0)
    check_graph(graph, target, version)
    check_version(graph, version)
    return version


def _journey(graph: LoweredGraph, options: BuildOptions) -> str:
    """What goes to the device, and what must be there, in words."""
    weights = graph.path.with_name(f"{graph.path.name}.data")
    beside = [path for path in (weights, graph.kernels, gate_folder(graph, options.gate)) if path and path.exists()]
    names = ", ".join(path.name if path.is_file() else f"{path.name}/" for path in beside)
    oldest = ".".join(map(str, OLDEST_TENSORRT))
    needed = f" (its plugins need TensorRT {oldest} or later there)" if graph.plugins else ""
    return f"take it{f' and {names}' if names else ''} to the device{needed} and run"


def _check_memory(graph: LoweredGraph, options: BuildOptions, progress: Progress) -> None:
    """Note the estimate; a graph whose weights alone exceed what is free is not begun."""
    estimate = estimate_memory(graph.model, options.batch.maximum, options.workspace)
    gpu = local_gpu()
    free = free_memory(gpu) if gpu is not None else None
    progress.note(estimate.sentence(free))
    if free is None or estimate.total <= free:
        return
    if estimate.weights > free:
        raise EnvironmentLacksError(
            f"{graph.path.name}: its weights alone are {size(estimate.weights)}, and {size(free)} of device memory are "
            "free; end what else uses the GPU"
        )
    progress.note("warning: the build may run out of memory: use a smaller largest batch (--batch) or --workspace")


def _build(
    job: EngineJob, cache: Path | None, target: Target, progress: Progress, begun: BegunEngine | None = None
) -> str:
    """Run the builder, or wait for the one that was `begun` for the same, and keep its timing cache; its version."""
    title = f"building for {target.name}"
    with _new_cache(cache) as new_cache:
        earlier = str(cache) if cache is not None and cache.is_file() else None
        job = replace(job, timing_cache=earlier, new_timing_cache=str(new_cache) if new_cache else None)
        try:
            result = _finished(begun, job, title, progress) or run_worker("build", job, title, progress)
        except WorkerError as error:
            if _OUT_OF_MEMORY.search(str(error)):
                raise EnvironmentLacksError(
                    f"{job.onnx}: target {target.name}: {error}; use a smaller largest batch (--batch) or --workspace, "
                    "or end what else uses the GPU"
                ) from error
            raise InputError(f"{job.onnx}: target {target.name} cannot be built: {error}") from error
    if cache is not None:
        progress.note(f"timing cache {cache}: {result['timing_cache']}")
    return str(result["version"])


def _finished(begun: BegunEngine | None, job: EngineJob, title: str, progress: Progress) -> dict[str, Any] | None:
    """What was `begun` of the same job; None without, or where it failed: alone it may have what it lacked."""
    if begun is None or not begun.is_of(job):
        return None
    try:
        return begun.finish(Path(job.engine), title, progress)
    except WorkerError as error:
        progress.note(f"{title} beside the gate failed ({error}); once more, alone")
        return None


@contextmanager
def _new_cache(cache: Path | None) -> Iterator[Path | None]:
    if cache is None:
        yield None
        return
    with atomic_path(cache) as temporary:
        yield temporary
