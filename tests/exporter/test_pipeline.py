"""The main job from the command line, on a tiny random PixArt: every stage real, nothing stood in for."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file

from exporter.cli import main
from exporter.metrics import read_metrics

RECIPE = """
model: {weights: model}
preset: w4a6
layers:
  - {match: "*.ff.net.0.proj", weight: e3m0, scales: channel}
  - {match: "transformer_blocks.*", group: 32}
calibration: {prompts: prompts.safetensors, steps: 3, samples: 2}
method: {name: fp4dit, iterations: 6, batch_size: 4}
evaluation: {trajectories: 2, grid: 3}
"""
TOKENS, CAPTION = 6, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its model and its prompts, in a folder of their own."""
    root = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    PixArtTransformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=CAPTION,
        use_additional_conditions=False,
    ).save_pretrained(root / "model" / "transformer")
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, 2:] = 0
    prompts = {
        "prompt_embeds": torch.randn(2, TOKENS, CAPTION),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": torch.randn(1, TOKENS, CAPTION),
        "negative_prompt_attention_mask": torch.ones(1, TOKENS),
    }
    save_file(prompts, root / "prompts.safetensors")
    (root / "tiny.yaml").write_text(RECIPE)
    return root


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    """The .onnx that the command made, with its graphs kept."""
    output = folder / "tiny.onnx"
    assert main([str(folder / "tiny.yaml"), "-o", str(output), "--keep-graphs", "--quiet"]) == 0
    return output


@pytest.mark.slow
def test_output_runs_in_stock_onnx_runtime_at_any_batch_size(exported: Path) -> None:
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    assert {node.domain for node in onnx.load(exported).graph.node} <= {"", "ai.onnx"}
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
def test_metrics_report_and_resolved_recipe_stand_beside_the_output(exported: Path) -> None:
    metrics = read_metrics(exported.with_name("tiny.metrics.json"))
    assert metrics["target"] == "cpu"
    assert metrics["size"]["output_bytes"] == exported.stat().st_size
    assert metrics["fidelity"]["passed"]
    assert metrics["fidelity"]["linear_min_snr_db"] >= 100
    assert metrics["quality"]["class_accuracy_fp"] is None
    stages = {"load", "capture", "calibrate", "quantize", "export", "lower", "validate", "build", "evaluate"}
    assert metrics["seconds"].keys() == stages
    page = exported.with_name("tiny.report.html").read_text()
    assert "transformer_blocks.1.ff.net.0.proj" in page
    assert main([str(exported.with_name("tiny.recipe.yaml")), "-o", str(exported), "--dry-run"]) == 0


@pytest.mark.slow
def test_every_graph_is_kept_on_request_and_valid(exported: Path) -> None:
    graphs = sorted((exported.with_name("tiny.work") / "graphs").glob("*.onnx"))
    names = [graph.name.split(".")[-2] for graph in graphs]
    assert {"fuse_linear", "fold_scales", "pack_weights", "lower_to_cpu"} <= set(names)
    for graph in graphs:
        onnx.checker.check_model(onnx.load(graph), full_check=True)


@pytest.mark.slow
def test_finished_stages_are_reused_and_the_bytes_are_the_same(
    exported: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "tiny.onnx"
    work = exported.with_name("tiny.work")
    assert main([str(folder / "tiny.yaml"), "-o", str(again), "--work-dir", str(work)]) == 0
    assert "calibrated earlier" in capsys.readouterr().err
    assert again.read_bytes() == exported.read_bytes()
    fresh = tmp_path / "fresh.onnx"
    assert main([str(folder / "tiny.yaml"), "-o", str(fresh), "--no-validate"]) == 0
    assert "calibrated earlier" not in capsys.readouterr().err
    assert fresh.read_bytes() == exported.read_bytes()
    assert read_metrics(tmp_path / "fresh.metrics.json")["fidelity"] is None


@pytest.mark.slow
def test_validate_passes_on_the_output_and_fails_on_a_tampered_one(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(exported), "--quiet"]) == 0
    model = onnx.load(exported)
    words = next(
        t
        for t in model.graph.initializer
        if t.name.startswith("transformer_blocks.1.attn2.to_v")
        and t.data_type == onnx.TensorProto.INT32
        and len(t.dims) == 2
    )
    raw = bytearray(words.raw_data)
    raw[0] ^= 0x07
    words.raw_data = bytes(raw)
    kept = exported.read_bytes()
    try:
        onnx.save(model, exported)
        assert main(["validate", str(exported), "--quiet"]) == 4
    finally:
        exported.write_bytes(kept)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "transformer_blocks.1.attn2.to_v" in error


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra 'rtx'")
@pytest.mark.parametrize("target", ["rtx-sm86", "rtx-sm89", "rtx-sm120"])
def test_plans_are_real_engines(exported: Path, folder: Path, tmp_path: Path, target: str) -> None:
    plan = tmp_path / f"{target}.plan"
    work = exported.with_name("tiny.work")
    arguments = [str(folder / "tiny.yaml"), "-o", str(plan), "--target", target, "--work-dir", str(work), "--quiet"]
    assert main(arguments) == 0
    metrics = read_metrics(tmp_path / f"{target}.metrics.json")
    assert metrics["target"] == target
    assert metrics["fidelity"]["passed"]
    assert plan.read_bytes()[:4] == b"vtrt"
    assert main(["validate", str(plan), "--quiet"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_a_missing_builder_ends_with_3_and_keeps_the_lowered_graph(
    exported: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "orin.plan"
    work = exported.with_name("tiny.work")
    arguments = [str(folder / "tiny.yaml"), "-o", str(plan), "--target", "orin", "--work-dir", str(work), "--quiet"]
    assert main(arguments) == 3
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert str(work / "lowered.orin.onnx") in error
    assert "trtexec" in error
    onnx.checker.check_model(onnx.load(work / "lowered.orin.onnx"), full_check=True)
    assert not plan.exists()


@pytest.mark.slow
def test_ctrl_c_ends_with_130_one_line_and_no_half_written_file(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped.onnx"
    command = [sys.executable, "-m", "exporter", str(folder / "tiny.yaml"), "-o", str(output)]
    command += ["--set", "method.iterations=100000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    work = tmp_path / "stopped.work"
    while not (work / "calibration.safetensors.seal").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("error: interrupted")
    assert not output.exists()
    assert [path.name for path in work.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_the_python_interface_of_the_readme(folder: Path, tmp_path: Path) -> None:
    from exporter import export, load_recipe

    recipe = load_recipe(folder / "tiny.yaml", ["method.name=rtn"])
    result = export(recipe, tmp_path / "python.onnx")
    assert result.fidelity is not None
    assert result.fidelity.passed
    assert json.loads(result.metrics.read_text())["quality"]["eps_snr_db_mean"] == result.evaluation.noise.mean_db


def test_output_problems_are_found_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(folder / "tiny.yaml")
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
