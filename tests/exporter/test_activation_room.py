"""What activations take, and whether there is room, known before any weights are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from exporter.activation_room import activation_room, existing
from exporter.calibration.placement import Placement
from exporter.cli import main
from exporter.recipe import Recipe, load_recipe
from tests.exporter.conftest import TOKENS
from tests.exporter.hunyuan_config import HUNYUAN_DIT

WIDTH, PATCHES, INPUTS, FLOAT = 64, 16, 2 * 3 * 2, 4
TOO_MANY = [
    word
    for setting in ("samples=10000000", "steps=1000", "memory=1e-5")
    for word in ("--set", f"calibration.{setting}")
]


@pytest.fixture
def config_only(tiny_job: Path, tmp_path: Path) -> Path:
    """The tiny job's recipe, whose model has no weights."""
    shutil.copytree(tiny_job, tmp_path / "job", ignore=shutil.ignore_patterns("tiny.*.*", "tiny.onnx", "*pytorch*"))
    return tmp_path / "job" / "tiny.yaml"


def _recipe(path: Path | str, *changes: str) -> Recipe:
    return load_recipe(path, changes, "cpu")


def test_a_dry_run_says_what_activations_take_and_where_they_go(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = INPUTS * FLOAT * (3 * PATCHES + TOKENS) * WIDTH
    before = sorted(tmp_path.rglob("*"))
    output, work = tmp_path / "x.onnx", tmp_path / "not" / "there"
    for flags, words in {
        "calibration.memory=1": f"activations {needed / 1000:.1f} kB of {INPUTS} inputs while blocks are learned, kept "
        "in memory (calibration.memory is 1.0 GB)\n",
        "calibration.memory=1e-5": f"kept in files in {work} (",
        "calibration.memory=1e-9": "; calibration.memory is 1 B)\n",
        "method.name=gptq": "activations none are kept (method.name: gptq)\n",
        "calibration.device=cuda": "while blocks are learned, kept ",
    }.items():
        command = [str(config_only), "-o", str(output), "--work-dir", str(work), "--dry-run", "--set", flags]
        assert main(command) == 0
        assert words in capsys.readouterr().out
    assert main([str(config_only), "-o", str(tmp_path / "x.bundle"), "--target", "orin,cpu", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("while blocks are learned, kept ") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [["x.onnx", "--dry-run"], ["x.bundle", "--target", "orin,cpu", "--dry-run"], ["x.onnx"], ["x.bundle"]],
)
def test_what_has_no_room_is_refused_from_the_config_alone(
    words: list[str], config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, *flags = words
    assert main([str(config_only), "-o", str(tmp_path / output), *flags, *TOO_MANY]) == 3
    said = capsys.readouterr()
    error = said.err.splitlines()[-1]
    assert error.startswith("error: calibration.samples: 10000000 trajectories need 276480.0 GB")
    assert "at most" in error
    assert (f"nowhere: calibration.memory is 10.0 kB, and {tmp_path / 'x.work'} has " in said.out) == (
        "--dry-run" in words
    )
    assert ("quantized layers" in said.out) == ("--dry-run" in words)


def test_ranges_are_refused_as_early(config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranges", str(config_only), "-o", str(tmp_path / "x.onnx"), *TOO_MANY]) == 3
    assert "trajectories need" in capsys.readouterr().err.splitlines()[-1]


def test_a_method_that_keeps_none_needs_no_room(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(config_only), "-o", str(tmp_path / "x.onnx"), *TOO_MANY, "--set", "method.name=rtn"]
    assert main([*command, "--dry-run"]) == 0
    # Comes as far as the weights, which are not there.
    assert main(command) == 2
    assert "safetensors" in capsys.readouterr().err.splitlines()[-1]


def test_skips_and_captions_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUNYUAN_DIT))
    changes = [f"model.weights={tmp_path}", "calibration.samples=64", "calibration.every=1", "method.name=fp4dit"]
    room = activation_room(_recipe("hunyuan_dit_v1_2_w4a6", *changes), tmp_path, Placement())
    tokens, width, skips = 64 * 64, 1408, 19
    assert room.needed == 64 * 50 * 2 * 4 * (3 + 2 * skips) * tokens * width
    assert room.needed > 6e12


def test_what_a_gpu_keeps_needs_no_other_room(config_only: Path, tmp_path: Path) -> None:
    gpu = Placement(torch.device("cuda", 0), memory=10**9)
    room = activation_room(_recipe(config_only, "calibration.memory=1e-9"), tmp_path, gpu)
    assert room.text().endswith("kept on the GPU")
    assert room.store() is None


def test_a_disk_is_known_by_the_nearest_folder(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert existing(tmp_path) == tmp_path
    assert existing(Path("not.there.work")) == Path.cwd()
