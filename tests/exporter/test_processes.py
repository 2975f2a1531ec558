"""One export by several processes, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_first_process_writes_and_speaks_for_all(tiny_job: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += ["--log-dir", str(tmp_path / "logs"), "--redirects", "3", "-m", "exporter", str(tiny_job / "tiny.yaml")]
    command += ["-o", str(tmp_path / "x.onnx"), "--no-validate", "--set", "method.scale_search=absmax"]
    command += ["--set", "layers.0.weight=auto", "--set", "method.step_weights=trajectory"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True)
    logs = (tmp_path / "logs").rglob("std*.log")
    said = {f"{path.parent.name}/{path.stem}": path.read_text() for path in logs}
    assert run.returncode == 0, said
    assert said["1/stdout"] == said["1/stderr"] == ""
    assert "calibrated 20 layers (fp4dit)" in said["0/stderr"]
    assert "chose formats of 2 layers" in said["0/stderr"]
    assert (tmp_path / "x.onnx").is_file()
    assert (tmp_path / "x.report.html").is_file()
    assert not any((tmp_path / "x.work").glob("unfinished.*"))
