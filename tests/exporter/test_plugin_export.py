"""The whole job with `kernels: plugin`: graph, kernels and the command for the device."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from exporter.cli import main
from exporter.device.program import main as build
from exporter.gate.table import GateResult
from exporter.validate import RESULT
from plugins.kernels.library import KernelLibrary, kernels_folder
from plugins.tensorrt_plugins.registration import plugin_op_types

LAYER = "transformer_blocks.0.ff.net.2"
RECIPE = f"""
model: {{weights: model}}
preset: w4a8
kernels: plugin
compute: fp16
layers:
  - {{match: "{LAYER}", group: 128}}
  - {{match: "*", weight: none}}
calibration: {{prompts: prompts.safetensors, steps: 3, samples: 2}}
method: {{name: rtn}}
evaluation: {{trajectories: 1}}
"""


@pytest.mark.slow
def test_export_ends_with_the_command_for_the_device(tiny_job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny_job / "plugin.yaml").write_text(RECIPE)
    assert main([str(tiny_job / "plugin.yaml"), "-o", str(tiny_job / "plugin.plan"), "--target", "orin"]) == 3
    said = capsys.readouterr()
    lowered = tiny_job / "plugin.work" / "lowered.orin.onnx"
    command = f"fp4export build {lowered} -o {tiny_job / 'plugin.plan'} --target orin"
    assert command in said.err
    assert "take it and lowered.orin.kernels/, gate.orin/ to the device (its plugins need TensorRT 10.9" in said.err
    assert not (tiny_job / "plugin.plan").exists()

    result = GateResult.from_json((tiny_job / "plugin.work" / "gate.orin" / RESULT).read_text())
    assert result.passed
    (layer,) = (row for row in result.rows if row.kind == "linear" and row.stage == "lowered")
    assert (layer.name, layer.threshold_db, layer.code_mismatches) == (LAYER, 100, 0)

    operators = plugin_op_types(onnx.load(lowered))
    assert operators == (
        "GeluQuantize_e4m3_fp16_fp16_k256",
        "PackedLinear_e2m1_fp16_fp16_n64_k256_g128m_bias_residual",
    )
    library = KernelLibrary.load(kernels_folder(lowered))
    assert {kernel.op_type for kernel in library.kernels} == set(operators)
    assert library.capabilities == ((8, 7),)

    words = ["build", str(lowered), "-o", str(tiny_job / "plugin.plan"), "--target", "h100"]
    assert build(words) == 2
    assert "for compute capability 9.0 (there are for: 8.7); export the model for this GPU's target" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("setting", "output", "target", "message"),
    [
        ("kernels=plugin", "x.onnx", "cpu", "target cpu takes `kernels: native` only"),
        ("kernels=plugin", "x.plan", "rtx-sm89", "TensorRT-RTX has no plugins; plugins run on: orin"),
        ("kernels=plugins", "x.plan", "orin", "plugin"),
    ],
)
def test_refusals(
    tiny_job: Path, capsys: pytest.CaptureFixture[str], setting: str, output: str, target: str, message: str
) -> None:
    command = [str(tiny_job / "tiny.yaml"), "-o", str(tiny_job / output), "--target", target, "--set", setting]
    for dry in ([], ["--dry-run"]):
        assert main([*command, *dry]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


def test_weights_alone_need_a_compute_type(tiny_job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(tiny_job / "tiny.yaml"), "-o", str(tiny_job / "x.plan"), "--target", "orin", "--dry-run"]
    command += ["--set", "preset=w4a16", "--set", "kernels=plugin"]
    assert main(command) == 2
    assert "use `compute: fp16` (or bf16), or `kernels: native`" in capsys.readouterr().err
    assert main([*command, "--set", "compute=fp16"]) == 0
    said = capsys.readouterr().out
    assert "kernels plugin" in said
    assert "storage packed in plugins, else container" in said


def test_packed_weights_are_expected_to_be_small(tiny_job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def expected(kernels: str) -> float:
        command = [str(tiny_job / "tiny.yaml"), "-o", str(tiny_job / "x.plan"), "--target", "orin", "--dry-run"]
        assert main([*command, "--set", f"kernels={kernels}", "--set", "layers.1.group=64"]) == 0
        return float(capsys.readouterr().out.rpartition("expected (")[2].partition(")")[0])

    assert expected("plugin") < expected("native")
