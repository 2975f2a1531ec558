"""One step of a build, run as a process of its own: `python -m exporter.device.worker STAGE JOB`, JOB as JSON.

A parser that meets what it does not know may end its process; what the main job has finished must outlive that. An
engine is loaded and compared in a process that did not build it, as it will be where it runs.
Messages of `exporter.device.jobs` go to the output stream; the libraries' own words to the error stream.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from exporter.device import tensorrt_api
from exporter.device.jobs import EngineCheck, EngineJob, Stage, message
from exporter.device.versions import load_module

_OUTPUT = threading.Lock()


def _emit(kind: str, **facts: object) -> None:
    """Print one message; TensorRT reports progress from several threads."""
    with _OUTPUT:
        sys.stdout.write(message(kind, **facts) + "\n")
        sys.stdout.flush()


def _build(job: EngineJob) -> None:
    trt = load_module(rtx=job.rtx)
    state = tensorrt_api.build_engine(trt, job, _emit)
    _emit("result", version=str(trt.__version__), timing_cache=state)


def _load(check: EngineCheck) -> None:
    trt = load_module(rtx=check.rtx)
    engine = tensorrt_api.load_engine(trt, Path(check.engine))
    Path(check.layers).write_text(tensorrt_api.describe_layers(trt, engine), encoding="utf-8")
    _emit("result", version=str(trt.__version__))


def _compare(check: EngineCheck) -> None:
    # Read once, when polygraphy is imported: it decides which of the two TensorRTs polygraphy drives.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(check.rtx))
    from exporter.device.acceptance import compare_outputs

    _emit("result", snr=compare_outputs(Path(check.engine), Path(check.inputs), Path(check.outputs)))


def run(stage: Stage, job: str) -> None:
    """Run one stage; its result is the last message. Raises `BuildError`, `ImportError`, `OSError`."""
    if stage == "build":
        _build(EngineJob.from_json(job))
    elif stage == "load":
        _load(EngineCheck.from_json(job))
    else:
        _compare(EngineCheck.from_json(job))


def main() -> int:
    """Run the stage and job in the arguments; 0 when the result is there."""
    stage, job = sys.argv[1:]
    try:
        run(stage, job)  # type: ignore[arg-type]
    except ImportError as error:
        _emit("lacks", text=str(error))
        return 1
    except (tensorrt_api.BuildError, OSError) as error:
        _emit("error", text=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
