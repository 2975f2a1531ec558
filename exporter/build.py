"""Lowered ONNX → TensorRT engine, in a process of its own, so that a build that crashes loses nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from exporter.engine_worker import RESULT_START, EngineJob
from exporter.errors import EnvironmentLacksError, InputError
from exporter.files import atomic_path
from exporter.onnx_files import read_model
from exporter.progress import Progress
from exporter.targets import Target, local_gpu

Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

_RTX_MAGIC = b"vtrt"
# Magic, version, size of the whole file; little-endian 64-bit numbers after four bytes each of magic and padding.
_RTX_HEADER = struct.Struct("<4s4xQQ")
_ERROR_MARK = "[E] "


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes that an engine takes, and the one it is tuned for."""

    minimum: int = 1
    best: int = 2
    maximum: int = 16

    def __post_init__(self) -> None:
        sizes = (self.minimum, self.best, self.maximum)
        if not 1 <= self.minimum <= self.best <= self.maximum:
            raise InputError(f"batch sizes (minimum, best, maximum) must be positive and ascending, not {sizes}")


@dataclass(frozen=True)
class EngineInfo:
    """A finished engine: where, for what, how large, built by what, in how many seconds."""

    path: Path
    target: str
    size_bytes: int
    builder: str
    seconds: float


def build_engine(
    lowered: Path, output: Path, target: Target, progress: Progress, batch: BatchRange | None = None
) -> EngineInfo:
    """Build `lowered` (ONNX in `target`'s own operators) into an engine file, which is written whole or not at all.

    TensorRT-RTX targets are built on any machine, TensorRT targets on the device itself. Dynamic dimensions, which
    are all the batch, range over `batch`. Raises `EnvironmentLacksError` where the builder or the device is not here,
    with the command to run where they are, and `InputError` naming the node that the builder refused.
    """
    shapes = profile_shapes(read_model(lowered, external_data=False), batch or BatchRange())
    rtx = target.engine == "tensorrt-rtx"
    _check_environment(lowered, output, target, shapes)
    start = time.monotonic()
    with progress.task(f"building for {target.name}", 1) as task, atomic_path(output) as temporary:
        capability = target.compute_capability if rtx else None
        version = _run(EngineJob(str(lowered), str(temporary), rtx, capability, shapes), target)
        if rtx:
            check_rtx_engine(temporary)
        task.advance()
    name = "TensorRT-RTX" if rtx else "TensorRT"
    seconds = time.monotonic() - start
    return EngineInfo(output, target.name, output.stat().st_size, f"{name} {version}", seconds)


def profile_shapes(model: onnx.ModelProto, batch: BatchRange) -> Shapes:
    """(min, opt, max) of every graph input that has a dynamic dimension."""
    constants = {tensor.name for tensor in model.graph.initializer}
    shapes = {}
    for value in model.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        if value.name in constants or all(dimension.HasField("dim_value") for dimension in dimensions):
            continue
        shapes[value.name] = tuple(
            tuple(dimension.dim_value if dimension.HasField("dim_value") else size for dimension in dimensions)
            for size in (batch.minimum, batch.best, batch.maximum)
        )
    return {name: (least, best, most) for name, (least, best, most) in shapes.items()}


def check_rtx_engine(path: Path) -> None:
    """Raise `InputError` unless the file starts as a whole TensorRT-RTX engine does.

    Its header holds a mark and the file's size; more cannot be checked without a GPU.
    """
    header = read_rtx_header(path)
    if header is None:
        raise InputError(f"{path}: not a TensorRT-RTX engine; build it again")
    size = path.stat().st_size
    if header.stated_bytes != size:
        raise InputError(
            f"{path}: a damaged TensorRT-RTX engine: {size} of {header.stated_bytes} bytes; build it again"
        )


@dataclass(frozen=True)
class RtxHeader:
    """What the first bytes of a TensorRT-RTX engine say: their own version, and the size of the whole file."""

    version: int
    stated_bytes: int


def read_rtx_header(path: Path) -> RtxHeader | None:
    """The engine's header, None for a file that does not start with one."""
    with path.open("rb") as file:
        start = file.read(_RTX_HEADER.size)
    if len(start) < _RTX_HEADER.size or start[:4] != _RTX_MAGIC:
        return None
    _, version, stated = _RTX_HEADER.unpack(start)
    return RtxHeader(version, stated)


def device_command(lowered: Path, output: Path, shapes: Shapes) -> str:
    """The one command that builds the engine on the device, with nothing but TensorRT installed."""
    flags = []
    for index, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
        sizes = ",".join(f"{name}:{'x'.join(map(str, shape[index]))}" for name, shape in shapes.items())
        flags += [f"--{flag}={sizes}"] if sizes else []
    return shlex.join(["trtexec", f"--onnx={lowered}", "--stronglyTyped", f"--saveEngine={output}", *flags])


def missing_builder(target: Target) -> str:
    """What building for `target` needs and this machine does not have; "" if it has all."""
    if target.engine == "onnxruntime":
        return ""
    if target.engine == "tensorrt-rtx":
        installed = importlib.util.find_spec("tensorrt_rtx") is not None
        return "" if installed else "TensorRT-RTX is not installed here (pip install 'fp4export[rtx]')"
    if importlib.util.find_spec("tensorrt") is None:
        return "TensorRT is not installed here (pip install 'fp4export[tensorrt]')"
    gpu = local_gpu()
    if gpu is None:
        return "there is no NVIDIA GPU here, and TensorRT builds only for the GPU it runs on"
    if gpu.compute_capability != target.compute_capability:
        here, wanted = (".".join(map(str, pair or ())) for pair in (gpu.compute_capability, target.compute_capability))
        return (
            f"TensorRT builds only for the GPU it runs on, here {gpu.name} with compute capability {here}, not {wanted}"
        )
    return ""


def _check_environment(lowered: Path, output: Path, target: Target, shapes: Shapes) -> None:
    missing = missing_builder(target)
    if not missing:
        return
    if target.engine == "tensorrt-rtx":
        advice = "then run the same command again"
    else:
        advice = f"on the device run: {device_command(lowered, output, shapes)}"
    raise EnvironmentLacksError(f"target {target.name}: {missing}; the lowered graph is ready: {lowered}; {advice}")


def _run(job: EngineJob, target: Target) -> str:
    """The builder's version. Raises `InputError` with what the builder said first."""
    package_root = str(Path(__file__).resolve().parent.parent)
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.run(  # noqa: S603 - this interpreter, this package's own module
            [sys.executable, "-m", "exporter.engine_worker", job.to_json()],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
        log.seek(0)
        lines = log.read().splitlines()
    if process.returncode == 0:
        result = next(line for line in reversed(lines) if line.startswith(RESULT_START))
        return str(json.loads(result)["version"])
    raise InputError(f"{job.onnx}: target {target.name} cannot be built: {_reason(lines, process.returncode)}")


def _reason(lines: list[str], status: int) -> str:
    """The builder's own words: the node it refused, else its first error, else how its process ended."""
    errors = [line.removeprefix(_ERROR_MARK) for line in lines if line.startswith(_ERROR_MARK)]
    node = next((line for line in errors if line.startswith("In node")), None)
    if node is not None:
        return node
    if errors:
        return errors[0]
    if status < 0:
        return f"the builder's process was ended by signal {-status}"
    return lines[-1] if lines else f"the builder's process ended with status {status}"
