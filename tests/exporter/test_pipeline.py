"""The main job from the command line, on a tiny random PixArt: every stage real, nothing stood in for."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.calibration_stages import calibrated_weights, captured_inputs
from exporter.cli import main
from exporter.job import open_job
from exporter.metrics import read_metrics
from exporter.model_stages import balanced
from exporter.passes.surgery import CONTRIB_DOMAIN
from exporter.recipe import load_recipe
from exporter.source import load_source
from exporter.stages import traced_key
from tests.exporter.progresses import Notes

TOKENS, CAPTION = 6, 20


@pytest.mark.slow
def test_output_runs_in_stock_onnx_runtime_at_any_batch_size(tiny_export: Path) -> None:
    session = onnxruntime.InferenceSession(str(tiny_export), providers=["CPUExecutionProvider"])
    assert {node.domain for node in onnx.load(tiny_export).graph.node} <= {"", CONTRIB_DOMAIN}
    for batch in (1, 3):
        feeds = {
            "hidden_states": np.zeros((batch, 3, 4, 4), np.float32),
            "encoder_hidden_states": np.zeros((batch, TOKENS, CAPTION), np.float32),
            "timestep": np.full(batch, 500, np.float32),
            "encoder_attention_mask": np.ones((batch, TOKENS), np.float32),
        }
        (sample,) = session.run(["sample"], feeds)
        assert sample.shape == (batch, 6, 4, 4)
        assert np.isfinite(sample).all()


@pytest.mark.slow
def test_metrics_report_and_resolved_recipe_stand_beside_the_output(tiny_export: Path) -> None:
    metrics = read_metrics(tiny_export.with_name("tiny.metrics.json"))
    assert metrics["target"] == "cpu"
    assert metrics["size"]["output_bytes"] == tiny_export.stat().st_size
    assert metrics["fidelity"]["passed"]
    assert metrics["fidelity"]["linear_min_snr_db"] >= 100
    assert metrics["quality"]["class_accuracy_fp"] is None
    before = {"load", "capture", "balance", "transform", "formats", "calibrate", "quantize", "export"}
    assert metrics["seconds"].keys() == before | {"lower", "validate", "build", "evaluate"}
    page = tiny_export.with_name("tiny.report.html").read_text()
    assert "transformer_blocks.1.ff.net.0.proj" in page
    assert main([str(tiny_export.with_name("tiny.recipe.yaml")), "-o", str(tiny_export), "--dry-run"]) == 0


@pytest.mark.slow
def test_every_graph_is_kept_on_request_and_valid(tiny_export: Path) -> None:
    graphs = sorted((tiny_export.with_name("tiny.work") / "graphs").glob("*.onnx"))
    names = [graph.name.split(".")[-2] for graph in graphs]
    assert {"fuse_linear", "fold_scales", "pack_weights", "lower_to_cpu"} <= set(names)
    for graph in graphs:
        onnx.checker.check_model(onnx.load(graph), full_check=True)


@pytest.mark.slow
def test_finished_stages_are_reused_and_the_bytes_are_the_same(
    tiny_export: Path, tiny_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "tiny.onnx"
    work = tiny_export.with_name("tiny.work")
    assert main([str(tiny_job / "tiny.yaml"), "-o", str(again), "--work-dir", str(work)]) == 0
    assert "calibrated earlier" in capsys.readouterr().err
    assert again.read_bytes() == tiny_export.read_bytes()
    fresh = tmp_path / "fresh.onnx"
    assert main([str(tiny_job / "tiny.yaml"), "-o", str(fresh), "--no-validate"]) == 0
    assert "calibrated earlier" not in capsys.readouterr().err
    assert fresh.read_bytes() == tiny_export.read_bytes()
    assert read_metrics(tmp_path / "fresh.metrics.json")["fidelity"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "by", "begun"),
    [
        ("stopped.work", signal.SIGINT, False),
        ("stopped.work/calibration.*.safetensors.seal", signal.SIGTERM, False),
        ("stopped.work/quantized.*.safetensors.seal", signal.SIGINT, False),
        ("stopped.work/exported.cpu.onnx", signal.SIGINT, True),
        ("stopped.work/gate.cpu", signal.SIGTERM, True),
        ("stopped.onnx", signal.SIGINT, True),
    ],
)
def test_a_run_interrupted_at_any_stage_ends_with_130_one_line_and_no_half_written_file(
    tiny_job: Path, begin: Callable[..., Path], tmp_path: Path, after: str, by: signal.Signals, begun: bool
) -> None:
    output = tmp_path / "stopped.onnx"
    if begun:
        begin(tmp_path / "stopped.work")
    command = [sys.executable, "-m", "exporter", str(tiny_job / "tiny.yaml"), "-o", str(output)]
    command += ["--set", "evaluation.samples=1000", "--set", "evaluation.trajectories=200"]
    if "calibration." in after:
        command += ["--set", "method.iterations=100000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    work = tmp_path / "stopped.work"
    while not any(tmp_path.glob(after)):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(by)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("error: interrupted")
    assert output.exists() == (after == "stopped.onnx")
    assert [path.name for path in work.rglob(".*")] == []


@pytest.mark.slow
def test_the_python_interface_of_the_readme(tiny_job: Path, begin: Callable[..., Path], tmp_path: Path) -> None:
    from exporter import export, load_recipe

    begin(tmp_path / "python.work")
    result = export(load_recipe(tiny_job / "tiny.yaml"), tmp_path / "python.onnx")
    assert result.fidelity is not None
    assert result.fidelity.passed
    assert json.loads(result.metrics.read_text())["quality"]["eps_snr_db_mean"] == result.evaluation.noise.mean_db


def test_output_problems_are_found_before_any_work(
    tiny_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tiny_job / "tiny.yaml")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "taken.work").write_text("")
    for output, words in {
        tmp_path / "missing" / "x.onnx": "mkdir -p",
        tmp_path / "folder.onnx": "is a folder",
        tmp_path / "taken.onnx": "--work-dir",
        tmp_path / "x.trt": ".onnx",
    }.items():
        assert main([recipe, "-o", str(output)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.onnx", "taken.work"]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["nothing", "scheduler", "prompts", "seed", "resolution"])
def test_a_changed_input_makes_its_stages_run_again(
    tiny_job: Path, begin: Callable[..., Path], tmp_path: Path, change: str
) -> None:
    job = tmp_path / "job"
    shutil.copytree(tiny_job / "model", job / "model")
    for file in ("tiny.yaml", "prompts.safetensors"):
        shutil.copy(tiny_job / file, job)
    begin(job / "tiny.work")
    settings = ["model.weights=model/transformer"]
    if change == "scheduler":
        (job / "model" / "scheduler").mkdir()
        (job / "model" / "scheduler" / "scheduler_config.json").write_text('{"beta_end": 0.01}')
    elif change == "prompts":
        tensors = load_file(job / "prompts.safetensors")
        tensors["prompt_embeds"] = tensors["prompt_embeds"] + 1
        save_file(tensors, job / "prompts.safetensors")
    elif change == "seed":
        settings.append("calibration.seed=7")
    elif change == "resolution":
        settings.append("model.resolution=5")
    recipe, progress = load_recipe(job / "tiny.yaml", settings), Notes()
    opened = open_job(recipe, job / "tiny.onnx", None, fresh=False, keep_graphs=False, progress=progress)
    original = load_source(opened)
    captured = captured_inputs(opened, original)
    source = balanced(opened, original, captured)
    calibrated_weights(opened, source, captured)
    reused = change == "nothing"
    assert any(line.startswith("captured earlier: 12 inputs") for line in progress.lines) == reused
    assert any(line.startswith("calibrated earlier") for line in progress.lines) == reused
    # All later stages, the traced graph first, are sealed under what this one is sealed under.
    (traced,) = opened.work.path.glob("traced.*.onnx")
    assert opened.work.is_current(traced, traced_key(opened, source)) == reused


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_one_line_that_names_the_file(
    tiny_job: Path, begin: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path / "x.work")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = main([str(tiny_job / "tiny.yaml"), "-o", str(tmp_path / "x.onnx")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert error.startswith("error: ")
    assert str(tmp_path) in error
    assert "cannot be written" in error
    assert not (tmp_path / "x.onnx").exists()


def test_a_classifier_that_cannot_judge_is_found_before_any_work(
    tiny_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.onnx").write_bytes(b"no graph")
    tensors = load_file(tiny_job / "prompts.safetensors")
    save_file(tensors | {"labels": torch.tensor([0, 1])}, tmp_path / "labelled.safetensors")
    command = [str(tiny_job / "tiny.yaml"), "-o", str(tmp_path / "x.onnx"), "--quiet"]
    command += ["--set", f"evaluation.classifier={tmp_path / 'c.onnx'}"]
    assert main(command) == 2
    assert "labels" in capsys.readouterr().err
    assert main([*command, "--set", f"calibration.prompts={tmp_path / 'labelled.safetensors'}"]) == 2
    assert str(tmp_path / "c.onnx") in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "x.work").iterdir()] == ["lock"]
