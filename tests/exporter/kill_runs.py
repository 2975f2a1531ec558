"""Run the same recipe several times, kill each run (SIGKILL) at a random moment, and let the last one finish.

`python -m tests.exporter.kill_runs RECIPE OUT calibrate|export MOMENT...` prints the moments and ends with the last
run's exit code. A moment is `sealed`, a little after something more is finished than before; `sealing`, when a file of
a calibration is written and its seal is not; or a number of seconds, of which any may be the last.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

# Imported once, lazily loaded classes too: runs are forks of this process, which computes nothing and has no threads.
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

from exporter.calibration_stages import calibrated_weights, captured_inputs
from exporter.cli import main
from exporter.job import open_job
from exporter.model_stages import balanced
from exporter.progress import NullProgress, Progress
from exporter.recipe import load_recipe
from exporter.source import load_source
from exporter.workdir import WorkDir

SETTINGS = ("method.scale_search=absmax", "method.start=gptq", "method.balance=true")
"""Of the recipe: as the default's, but for the search of scales, for speed."""

# Whether a child has ended, without burying it.
_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT

IMPORTED = (DPMSolverMultistepScheduler, PixArtTransformer2DModel)


@dataclass(frozen=True)
class _KilledSealing(WorkDir):
    """Kills its process when there are so many seals and it is to write the next one."""

    seals: int = 0

    def seal(self, path: Path, key: str) -> None:
        if _seals(self.path) >= self.seals:
            os.kill(os.getpid(), signal.SIGKILL)
        super().seal(path, key)


def calibrate(recipe: Path, output: Path, progress: Progress | None = None, seals: int | None = None) -> None:
    """What an export of `recipe` to `output` does up to the calibrated weights, its lock included; killed while it
    seals a file when there are as many `seals`."""
    quick = load_recipe(recipe, SETTINGS)
    job = open_job(quick, output, None, fresh=False, keep_graphs=False, progress=progress or NullProgress())
    if seals is not None:
        job = replace(job, work=_KilledSealing(job.work.path, job.work.fresh, seals))
    with job.work.locked():
        source = load_source(job)
        captured = captured_inputs(job, source)
        calibrated_weights(job, balanced(job, source, captured), captured)


def export(recipe: Path, output: Path) -> None:
    """A whole export but for the gate."""
    os._exit(main([str(recipe), "-o", str(output), "--no-validate", "--quiet"]))


RUNS: dict[str, Callable[[Path, Path], None]] = {"calibrate": calibrate, "export": export}


def kill_runs(recipe: Path, output: Path, run: Callable[[Path, Path], None], moments: list[str]) -> None:
    """Kill a run at each of the moments. What a run finishes before that is thrown away, so that there is something to
    kill."""
    work = output.with_suffix(".work")
    for moment in moments:
        while True:
            before = _seals(work)
            said, child = _begun(recipe, output, run, moment, before)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == -signal.SIGKILL:
                sys.stdout.write(f"killed {said} when there were {_seals(work)} seals\n")
                break
            if code:
                sys.exit(code)
            shutil.rmtree(work)


def _begun(recipe: Path, output: Path, run: Callable[[Path, Path], None], moment: str, before: int) -> tuple[str, int]:
    """Begin a run that is killed, and say when."""
    if moment == "sealing":
        # One of the files of scales, error feedback and both blocks, or one before them.
        seals = before + random.randrange(4)
        return moment, _fork(partial(calibrate, seals=seals), recipe, output)
    child = _fork(run, recipe, output)
    delay = random.uniform(0, 0.05 if moment == "sealed" else float(moment))
    while moment == "sealed" and _seals(output.with_suffix(".work")) <= before and not _has_ended(child):
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return f"{delay:.3f} s after {moment}", child


def _has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, _ENDED) is not None


def _seals(work: Path) -> int:
    return len(list(work.rglob("*.seal")))


def _fork(run: Callable[[Path, Path], None], recipe: Path, output: Path) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        run(recipe, output)
        os._exit(0)
    return child


if __name__ == "__main__":
    words = Path(sys.argv[1]), Path(sys.argv[2])
    kill_runs(*words, RUNS[sys.argv[3]], sys.argv[4:])
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(_fork(RUNS[sys.argv[3]], *words), 0)[1]))
