"""Preference models in processes of their own: their packages' requirements contradict those of ONNX.

hpsv2 asks for protobuf < 4; image-reward pins an old timm. So each may live in an environment of its own, whose Python
runs the small worker in `exporter/evaluation/workers`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from exporter.progress import Task

_WORKERS = Path(__file__).with_name("workers")
_MISSING = 3
"""A worker's exit code when its package is not installed."""


def preference_scores(
    worker: str, python: str | None, images: Sequence[Path], texts: Sequence[str], task: Task
) -> list[float]:
    """One score an image, by `worker` in the interpreter `python` (this one if None).

    Raises `ImportError` when the package is not installed there, `RuntimeError` with the worker's last words when it
    fails, and `OSError` when the interpreter cannot be started.
    """
    jobs = [{"image": str(image), "prompt": text} for image, text in zip(images, texts, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        job_file = Path(folder, "jobs.json")
        job_file.write_text(json.dumps(jobs), encoding="utf-8")
        command = [python or sys.executable, str(_WORKERS / f"{worker}_scores.py"), str(job_file)]
        with Path(folder, "errors.txt").open("w+", encoding="utf-8") as errors:
            scores, status = _run(command, errors.fileno(), task)
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.strip()]
    reason = lines[-1] if lines else f"it ended with status {status}"
    if status == _MISSING:
        raise ImportError(reason)
    if status or len(scores) != len(jobs):
        raise RuntimeError(reason)
    return scores


def _run(command: list[str], errors: int, task: Task) -> tuple[list[float], int]:
    """The scores, one a line on the worker's output, and its exit code."""
    scores = []
    with subprocess.Popen(  # noqa: S603 - the user's interpreter, this package's own script
        command, stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process:
        for line in process.stdout or ():
            # Packages print to the same stream.
            if line.startswith("score "):
                scores.append(float(line.removeprefix("score ")))
                task.advance()
    return scores, process.returncode
