"""Run the same recipe several times, kill each run (SIGKILL) at a random moment, and let the last one finish.

`python -m tests.exporter.kill_runs RECIPE OUT RUNS calibrate|export` prints the moments and ends with the last run's
exit code.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Imported once, lazily loaded classes too: runs are forks of this process, which computes nothing and has no threads.
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

from exporter.cli import main
from exporter.job import open_job
from exporter.progress import NullProgress, Progress
from exporter.recipe import load_recipe
from exporter.source import load_source
from exporter.stages import calibrated_weights, captured_inputs

SEARCH = "method.scale_search=absmax"
"""Of the recipe, for speed."""

# Whether a child has ended, without burying it.
_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT

IMPORTED = (DPMSolverMultistepScheduler, PixArtTransformer2DModel)


def calibrate(recipe: Path, output: Path, progress: Progress | None = None) -> None:
    """What an export of `recipe` to `output` does up to the calibrated weights, its lock included."""
    quick = load_recipe(recipe, [SEARCH])
    job = open_job(quick, output, None, fresh=False, keep_graphs=False, progress=progress or NullProgress())
    with job.work.locked():
        source = load_source(job)
        calibrated_weights(job, source, captured_inputs(job, source))


def export(recipe: Path, output: Path) -> None:
    """A whole export but for the gate."""
    os._exit(main([str(recipe), "-o", str(output), "--no-validate", "--quiet"]))


RUNS: dict[str, Callable[[Path, Path], None]] = {"calibrate": calibrate, "export": export}


def kill_runs(recipe: Path, output: Path, runs: int, run: Callable[[Path, Path], None]) -> None:
    """Kill so many runs, each a little after it has finished something more than those before it.

    What a run finishes before it is killed is thrown away, so that there is something to kill.
    """
    work, killed = output.with_suffix(".work"), 0
    while killed < runs:
        before = _seals(work)
        child = _fork(run, recipe, output)
        while _seals(work) <= before and os.waitid(os.P_PID, child, _ENDED) is None:
            time.sleep(0.001)
        delay = random.uniform(0, 0.05)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == -signal.SIGKILL:
            sys.stdout.write(f"killed {delay:.3f} s after there were {before + 1} seals\n")
            killed += 1
        elif code == 0:
            shutil.rmtree(work)
        else:
            sys.exit(code)


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
    kill_runs(*words, int(sys.argv[3]), RUNS[sys.argv[4]])
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(_fork(RUNS[sys.argv[4]], *words), 0)[1]))
