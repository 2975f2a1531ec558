"""One export by several processes, as torchrun starts them."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exporter.cli import main

ROOT = Path(__file__).parents[2]
PROCESSES = 2
_LONGEST = 300
MOMENTS = ("formats.*", "*scales*", "*transformer_blocks.0*")
CHANGES = (
    "method.scale_search=absmax",
    "layers.0.weight=auto",
    "method.step_weights=trajectory",
    # So many that a block which is finished can be seen before the next one is.
    "method.iterations=40",
)


@dataclass(frozen=True)
class Finished:
    """What the processes wrote next to `output`, and what each said: by rank and stream."""

    output: Path
    said: dict[str, str]


@pytest.fixture(scope="module")
def finished(tiny_job: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An export by torchrun that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("processes")
    output, logs = folder / "x.onnx", folder / "logs"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES)]
    command += ["--master-port", str(_free_port()), "--log-dir", str(logs), "--redirects", "3", "-m"]
    command += _exporter(tiny_job, output)
    run = subprocess.run(command, cwd=ROOT, env=_environment(), check=False, capture_output=True)
    said = {f"{path.parent.name}/{path.stem}": path.read_text() for path in logs.rglob("std*.log")}
    assert run.returncode == 0, said
    return Finished(output, said)


@pytest.mark.slow
def test_the_first_process_writes_and_speaks_for_all(finished: Finished) -> None:
    assert finished.said["1/stdout"] == finished.said["1/stderr"] == ""
    assert "calibrated 20 layers (fp4dit)" in finished.said["0/stderr"]
    assert "chose formats of 2 layers" in finished.said["0/stderr"]
    assert finished.output.is_file()
    assert finished.output.with_suffix(".report.html").is_file()
    assert not any(finished.output.with_suffix(".work").glob("unfinished.*"))


@pytest.mark.slow
def test_processes_that_are_killed_end_with_the_same_bytes(tiny_job: Path, finished: Finished, tmp_path: Path) -> None:
    """Of each run both processes are killed, a little after it has finished what the moment names."""
    output, delays = tmp_path / finished.output.name, []
    work = output.with_suffix(".work")
    for moment in MOMENTS:
        delays.append(random.uniform(0, 0.02))
        with _started(tiny_job, output, tmp_path) as processes:
            while not _seals(work, moment) and all(process.poll() is None for process in processes):
                time.sleep(0.001)
            time.sleep(delays[-1])
            for process in processes:
                process.kill()
            codes = [process.wait(_LONGEST) for process in processes]
        assert codes == [-signal.SIGKILL] * PROCESSES, (moment, delays, (tmp_path / "said").read_text())
    with _started(tiny_job, output, tmp_path) as processes:
        codes = [process.wait(_LONGEST) for process in processes]
    assert codes == [0] * PROCESSES, (delays, (tmp_path / "said").read_text())
    assert output.read_bytes() == finished.output.read_bytes(), delays
    made, expected = (_weights(path.with_suffix(".work")) for path in (output, finished.output))
    assert made == expected, delays


@pytest.mark.slow
def test_one_process_learns_what_two_learn(tiny_job: Path, finished: Finished, tmp_path: Path) -> None:
    """But for what another order of sums decides: one in a thousand of the words of packed codes at most."""
    output = tmp_path / finished.output.name
    assert main(["--quiet", *_exporter(tiny_job, output)[1:]]) == 0
    alone, shared = (load_file(_quantized(path.with_suffix(".work"))) for path in (output, finished.output))
    assert alone.keys() == shared.keys()
    words = [name for name in alone if name.endswith(".words")]
    differ = sum(int((alone[name] != shared[name]).sum()) for name in words)
    assert differ <= 1e-3 * sum(alone[name].numel() for name in words)
    for name in alone.keys() - set(words):
        torch.testing.assert_close(alone[name], shared[name])


@pytest.mark.parametrize("change", ["model.resolution=5", "calibration.seed=1", "method.iterations=41"])
def test_processes_that_are_not_alike_are_told_so(tiny_job: Path, tmp_path: Path, change: str) -> None:
    """Both are: else one would look for the other's files, and say only that they are not there."""
    with _started(tiny_job, tmp_path / "x.onnx", tmp_path, "--set", change) as processes:
        assert [process.wait(_LONGEST) for process in processes] == [2, 2]
    said = (tmp_path / "said").read_text()
    for rank in range(PROCESSES):
        assert f"error: process {rank} of 2 is not like the others: all need the same recipe" in said
    assert not any((tmp_path / "x.work").glob("quantized.*"))


def _quantized(work: Path) -> Path:
    (found,) = work.glob("quantized.*safetensors")
    return found


@contextmanager
def _started(job: Path, output: Path, folder: Path, *second: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes as torchrun starts them, but under nobody's care; what they say is added to folder/said. None of
    them is left in the end. `second` are further words for the second one."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(PROCESSES)}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "said").open("a") as said:
            for rank in range(PROCESSES):
                environment = {**_environment(), **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, "-m", *_exporter(job, output), *(second if rank else ())]
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _seals(work: Path, pattern: str) -> list[Path]:
    """What is finished of what the pattern names; a folder may vanish while it is looked through."""
    try:
        return [path for path in work.rglob(f"{pattern}.seal") if not path.name.startswith(".")]
    except FileNotFoundError:
        return []


def _weights(work: Path) -> dict[Path, bytes]:
    return {path.relative_to(work): path.read_bytes() for path in work.rglob("*.safetensors")}


def _exporter(job: Path, output: Path) -> list[str]:
    changes = [word for change in CHANGES for word in ("--set", change)]
    return ["exporter", str(job / "tiny.yaml"), "-o", str(output), "--no-validate", *changes]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
