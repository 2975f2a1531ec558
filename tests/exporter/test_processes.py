"""One export by two processes, as torchrun starts them, gives what one process gives."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.calibration.reconstruction import draw_batch
from exporter.job import open_job
from exporter.progress import NullProgress
from exporter.quantize import CalibrationResult
from exporter.recipe import load_recipe
from exporter.source import load_source
from exporter.stages import calibrated_weights, captured_inputs

ROOT = Path(__file__).parents[2]
CHANGES = (
    "method.iterations=40",
    "method.learning_rate=0.02",
    "method.batch_size=8",
    "method.scale_search=absmax",
    "calibration.samples=4",
)


@pytest.fixture
def recipe(tiny_job: Path, tmp_path: Path) -> Path:
    """The tiny job with larger weights: fresh blocks are nearly the identity, and there is little to learn."""
    job = Path(shutil.copytree(tiny_job, tmp_path / "job", ignore=shutil.ignore_patterns("*.work", "*.onnx")))
    (weights,) = (job / "model" / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    scaled = {
        name: tensor * 3 if tensor.ndim == 2 and name.startswith("transformer_blocks") else tensor
        for name, tensor in tensors.items()
    }
    save_file(scaled, weights)
    return job / "tiny.yaml"


def _calibrated(recipe: Path, output: Path) -> CalibrationResult:
    """The calibrated weights in the output's work folder; made there if need be."""
    job = open_job(load_recipe(recipe, CHANGES), output, None, fresh=False, keep_graphs=False, progress=NullProgress())
    source = load_source(job)
    return calibrated_weights(job, source, captured_inputs(job, source))


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "shared.onnx"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += ["--log-dir", str(tmp_path / "logs"), "--redirects", "3", "-m", "exporter"]
    command += [
        str(recipe),
        "-o",
        str(output),
        "--no-validate",
        *(word for change in CHANGES for word in ("--set", change)),
    ]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    said = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in (tmp_path / "logs").rglob("std*.log")}
    assert run.returncode == 0, said
    assert [text for path, text in said.items() if "/1/" in path] == ["", ""]
    assert output.with_suffix(".report.html").is_file()
    (learned,) = output.with_suffix(".work").glob("quantized.*.safetensors")
    written = learned.stat().st_mtime_ns
    shared, alone = _calibrated(recipe, output), _calibrated(recipe, tmp_path / "alone.onnx")
    assert learned.stat().st_mtime_ns == written, "learned again, by one process"
    for one, other in zip(alone.blocks, shared.blocks, strict=True):
        assert one.error_calibrated < 0.97 * one.error_start
        assert other.error_start == pytest.approx(one.error_start, rel=1e-3)
        assert other.error_calibrated == pytest.approx(one.error_calibrated, rel=1e-2)
    codes = [torch.cat([weight.codes.flatten() for weight in result.weights.values()]) for result in (alone, shared)]
    # Sums of gradients in another order decide a rounding that is a tie.
    assert float((codes[0] != codes[1]).float().mean()) < 2e-3


@pytest.mark.parametrize(("count", "batch_size"), [(24, 8), (25, 8), (31, 8), (8, 8), (5, 8)])
def test_every_process_has_its_share_of_a_batch_among_its_own_samples(count: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_batch(count, batch_size, generator) for _ in range(400)])
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == count - 1
    assert len(drawn.unique()) == count
    if count >= batch_size:
        assert bool((drawn % batch_size == torch.arange(batch_size)).all())
        assert all(len(set(batch)) == batch_size for batch in drawn.tolist())
