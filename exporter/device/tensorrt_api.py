"""TensorRT 10.3 to 11 and TensorRT-RTX through one door: where their Python interfaces differ, it is here.

Plain TensorRT, because polygraphy's loaders know neither the network flag for ahead-of-time plugins nor whether a
timing cache was of this GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from exporter.device.jobs import CacheState, EngineJob
from plugins.kernels.library import KernelLibrary, KernelLibraryError
from plugins.op import UnknownOperatorError
from plugins.tensorrt_plugins.registration import PluginError, register

Emit = Callable[..., None]


class BuildError(Exception):
    """TensorRT refused; the message is its own."""


def build_engine(trt: Any, job: EngineJob, emit: Emit) -> CacheState:
    """Build `job.onnx` and write the engine and the timing cache; whether an earlier cache could be used.

    `emit(kind, **facts)` gets the builder's progress. Raises `BuildError`.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    if job.kernels is not None:
        # Before the parser looks for them; creators stay registered as long as the process lives.
        _register_plugins(job.plugins, Path(job.kernels), job.compute_capability)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt, plugins=job.kernels is not None))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):
        raise BuildError(_parser_error(parser))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    monitor = _monitor(trt, emit)
    config.progress_monitor = monitor
    if job.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    if job.rtx:
        config.num_compute_capabilities = 1
        major, minor = job.compute_capability
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), 0)
    if job.shapes:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in job.shapes.items():
            profile.set_shape(name, least, best, most)
        config.add_optimization_profile(profile)
    state = _set_timing_cache(config, job)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError("the builder made no engine")
    Path(job.engine).write_bytes(engine)
    if job.new_timing_cache is not None:
        Path(job.new_timing_cache).write_bytes(config.get_timing_cache().serialize())
    return state


def load_engine(trt: Any, path: Path) -> Any:
    """The engine in `path`, on the GPU that is here. Raises `BuildError`."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise BuildError(f"{path}: TensorRT cannot deserialize it on this machine")
    return engine


def describe_layers(trt: Any, engine: Any) -> str:
    """What TensorRT's engine inspector says of all layers, as JSON."""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _register_plugins(op_types: Sequence[str], kernels: Path, capability: tuple[int, int]) -> None:
    """Make this process's TensorRT have the plugins, with kernels for that GPU. Raises `BuildError`."""
    try:
        register(op_types, KernelLibrary.load(kernels), capability)
    except (KernelLibraryError, UnknownOperatorError, PluginError) as error:
        raise BuildError(str(error)) from error


def _network_flags(trt: Any, *, plugins: bool) -> int:
    """Strong typing and plugins compiled ahead of time, as far as this version makes them a choice."""
    wanted = ["STRONGLY_TYPED"] + (["PREFER_AOT_PYTHON_PLUGINS"] if plugins else [])
    flags = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in wanted]
    return sum(1 << int(flag) for flag in flags if flag is not None)


def _parser_error(parser: Any) -> str:
    if not parser.num_errors:
        return "the ONNX parser refused the graph"
    error = parser.get_error(0)
    # Since 10.0 an error names its node.
    name, operator = (getattr(error, fact, str)() for fact in ("node_name", "node_operator"))
    where = f"In node {error.node()} with name {name!r} and operator {operator}: " if operator else ""
    return where + str(error.desc())


def _set_timing_cache(config: Any, job: EngineJob) -> CacheState:
    """TensorRT itself compares a cache's version and GPU with its own."""
    if job.new_timing_cache is None:
        return "off"
    if job.timing_cache is not None:
        earlier = config.create_timing_cache(Path(job.timing_cache).read_bytes())
        if earlier is not None and config.set_timing_cache(earlier, False):
            return "used"
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return "new" if job.timing_cache is None else "of another version or GPU"


def _monitor(trt: Any, emit: Emit) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes the builder's phases on; never asks it to stop."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            emit("start", phase=phase_name, steps=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            emit("step", phase=phase_name, done=step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            emit("finish", phase=phase_name)

    return Monitor()
