"""An engine that is built beside other work: TensorRT-RTX takes one core, no GPU, and as long as the gate."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

import onnx

from exporter.device.child import run_worker
from exporter.device.jobs import EngineJob
from exporter.memory import usable_memory

if TYPE_CHECKING:
    from exporter.progress import Progress

# The other work comes first where cores are few.
_NICENESS = 5
# TensorRT-RTX takes up to 1.3 times a graph's weights in FP32, whatever holds them, and what runs beside it as much.
_ROOM = 2.6
_FP32_BYTES = 4


def is_room_beside(lowered: onnx.ModelProto) -> bool:
    """Whether there is memory for a builder of this graph, which may lack its weights' values, beside what else goes
    on."""
    weights: int = sum(math.prod(tensor.dims) for tensor in lowered.graph.initializer)
    return usable_memory() > _ROOM * _FP32_BYTES * weights


class BegunEngine:
    """Runs a worker that builds `job`; leaving the context ends it if it is not done."""

    def __init__(self, job: EngineJob) -> None:
        self._job = job
        self._process: subprocess.Popen[str] | None = None
        self._left, self._lock = False, Lock()
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> BegunEngine:
        # Where an export runs; a device that only builds has no terminal's libraries.
        from exporter.progress import NullProgress

        self._result = self._pool.submit(run_worker, "build", self._job, "", NullProgress(), self._started)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._left = True
            if self._process is not None:
                self._process.kill()
        self._pool.shutdown()

    def is_of(self, job: EngineJob) -> bool:
        """Whether it builds the same, wherever to."""
        return replace(job, engine=self._job.engine) == self._job

    def finish(self, engine: Path, title: str, progress: Progress) -> dict[str, Any]:
        """The worker's result, once it is there, and its engine moved to `engine`. Raises what `run_worker` does."""
        with progress.task(title, 1) as task:
            result = self._result.result()
            task.advance()
        shutil.move(self._job.engine, engine)
        return result

    def _started(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._process = process
            if self._left:
                process.kill()
        # A courtesy, which a system may refuse or the process no longer be there for.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)
