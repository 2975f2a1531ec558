"""Runs the worker and shows what it reports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from exporter.device.jobs import EngineCheck, EngineJob, Stage, read_message
from exporter.errors import EnvironmentLacksError

if TYPE_CHECKING:
    from exporter.progress import Progress, Task

_ERROR = re.compile(r"^(?:\[[^\]]*\] )?(?:\[TRT\] )?\[E\] (.*)")


class WorkerError(Exception):
    """The worker ended without a result; the message says why in one line."""


@dataclass
class _Phase:
    name: str
    steps: int
    done: int = 0


class PhaseBar:
    """The innermost of TensorRT's nested phases, as one bar at a time."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title
        self._phases: list[_Phase] = []
        self._bar = ExitStack()
        self._task: Task | None = None

    def __enter__(self) -> PhaseBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, facts: Mapping[str, Any]) -> None:
        """Follow one message of the builder; steps of phases that are not the innermost are only remembered."""
        kind, name = facts["kind"], facts["phase"]
        if kind == "start":
            self._phases.append(_Phase(name, max(int(facts["steps"]), 1)))
            self._show()
        elif kind == "step":
            phase = next((phase for phase in reversed(self._phases) if phase.name == name), None)
            if phase is not None:
                steps, phase.done = int(facts["done"]) - phase.done, int(facts["done"])
                if phase is self._phases[-1] and self._task is not None and steps > 0:
                    self._task.advance(steps)
        elif kind == "finish":
            innermost = bool(self._phases) and self._phases[-1].name == name
            self._phases = [phase for phase in self._phases if phase.name != name]
            if innermost:
                self._show()

    def _show(self) -> None:
        self._bar.close()
        self._task = None
        if self._phases:
            phase = self._phases[-1]
            self._task = self._bar.enter_context(self._progress.task(f"{self._title}: {phase.name}", phase.steps))
            self._task.advance(phase.done)


@dataclass
class _Heard:
    """What a worker has said so far."""

    result: dict[str, Any] | None = None
    error: str = ""
    lines: list[str] = field(default_factory=list)


def run_worker(
    stage: Stage,
    job: EngineJob | EngineCheck,
    title: str,
    progress: Progress,
    started: Callable[[subprocess.Popen[str]], None] = lambda process: None,
) -> dict[str, Any]:
    """The worker's result; its phases are shown under `title`. `started` is given the process when it has begun.

    Raises `WorkerError`, and `EnvironmentLacksError` where TensorRT or polygraphy cannot be imported.
    """
    heard = _Heard()
    with PhaseBar(progress, title) as bar, tempfile.TemporaryFile("w+", errors="replace") as log:
        with _started(stage, job.to_json(), log) as process:
            started(process)
            for line in process.stdout or ():
                facts = read_message(line)
                if facts is None:
                    heard.lines.append(line.rstrip())
                elif facts["kind"] == "result":
                    heard.result = facts
                elif facts["kind"] == "lacks":
                    raise EnvironmentLacksError(f"TensorRT cannot be used here: {facts['text']}")
                elif facts["kind"] == "error":
                    heard.error = facts["text"]
                else:
                    bar.update(facts)
        log.seek(0)
        lines = [*heard.lines, *log.read().splitlines()]
    if process.returncode == 0 and heard.result is not None:
        return heard.result
    raise WorkerError(" ".join(_reason(lines, heard.error, process.returncode).split()))


@contextmanager
def _started(stage: Stage, job: str, log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """The worker's process, ended with the block whatever ends it."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "exporter.device.worker", stage, job]
    with (
        subprocess.Popen(  # noqa: S603 - this interpreter, this package's own module
            command, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace", env=environment
        ) as process,
        ExitStack() as broken_off,
    ):
        broken_off.callback(process.kill)
        yield process
        broken_off.pop_all()


def _reason(lines: list[str], error: str, status: int) -> str:
    """The node that the parser refused, else TensorRT's first error, else how the process ended."""
    if error.startswith("In node"):
        return error
    errors = [found[1] for found in map(_ERROR.match, lines) if found]
    if errors:
        return errors[0]
    if error:
        return error
    if status < 0:
        return f"the builder's process was ended by signal {-status}"
    return lines[-1] if lines else f"the builder's process ended with status {status}"
