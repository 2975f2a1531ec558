"""What is checked before an export takes long."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exporter.calibration.activations import ActivationStore
from exporter.calibration.placement import Placement
from exporter.cli import main
from exporter.job import open_job
from exporter.progress import NullProgress
from exporter.recipe import load_recipe
from exporter.shards import Shard
from exporter.source import activation_bytes, choose_activation_store


def test_a_block_of_pixart_needs_three_activations_and_the_captions() -> None:
    tokens, captions, width = 1024, 120, 1152
    assert activation_bytes(tokens * width, 0, captions * width) == 4 * (3 * tokens + captions) * width
    assert activation_bytes(tokens * width, 2, 0) == 4 * 7 * tokens * width


def test_activations_beyond_the_recipes_memory_are_announced_as_files(
    tiny_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_job / "tiny.yaml"), "-o", str(tmp_path / "x.onnx"), "--set", "calibration.memory=1e-5"]
    # Stops behind the announcement: the recipe has no labels.
    assert main([*command, "--set", "evaluation.classifier=missing.onnx"]) == 2
    assert "missing.onnx does not exist" in capsys.readouterr().err
    command += ["--set", "calibration.samples=10000000"]
    assert main(command) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert "calibration.samples: 10000000 trajectories need" in error
    assert "trajectories fit" not in error
    assert "at most" in error
    assert "--work-dir" in error


def test_activations_are_where_there_is_room(tiny_job: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny_job / "tiny.yaml", (), "cpu")
    job = open_job(recipe, tmp_path / "x.onnx", tmp_path, fresh=False, keep_graphs=False, progress=NullProgress())
    gpu = Placement(torch.device("cuda", 0), memory=1000)

    def chosen(activations: int, memory: int, processes: int = 1) -> ActivationStore:
        shared = replace(job, shard=Shard(rank=0, world=processes))
        return choose_activation_store(shared, activations, block=10, memory=memory, placement=gpu)

    assert chosen(440, memory=0).device == gpu.device
    assert chosen(880, memory=0, processes=2).device == gpu.device
    assert chosen(880, memory=1000) == ActivationStore()
    assert chosen(880, memory=100).folder == job.work.path
    assert chosen(0, memory=0) == ActivationStore()
