"""Every preset on every kind of target, and validating outputs again, tampered ones too; nothing stood in for."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from exporter.cli import main
from exporter.errors import FidelityError
from exporter.files import sha256_of
from exporter.metrics import read_metrics
from exporter.progress import NullProgress
from exporter.validate import validate_output
from tests.exporter.conftest import preset_settings
from tests.exporter.tampering import flip_a_bit_of_one_code, swap_two_codes

LAYER = "transformer_blocks.1.attn2.to_v"
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra 'rtx'")

Arrays = dict[str, np.ndarray]


def one_nibble_flipped(arrays: Arrays) -> str:
    return flip_a_bit_of_one_code(arrays, LAYER)


def a_pair_swapped(arrays: Arrays) -> str:
    return swap_two_codes(arrays, LAYER)


def scale_off_by_one_percent(arrays: Arrays) -> str:
    name = next(n for n, a in arrays.items() if n.startswith(f"{LAYER}.row_scales"))
    arrays[name] *= np.float32(1.01)
    return name


@pytest.mark.slow
@pytest.mark.parametrize("change", [one_nibble_flipped, a_pair_swapped, scale_off_by_one_percent])
def test_a_tampered_output_fails_by_the_layer_s_name(
    tiny_export: Path, change: Callable[[Arrays], str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(tiny_export)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    arrays = {name: numpy_helper.to_array(tensor).copy() for name, tensor in tensors.items()}
    name = change(arrays)
    tensors[name].CopyFrom(numpy_helper.from_array(arrays[name], name))
    kept = tiny_export.read_bytes()
    try:
        onnx.save(model, tiny_export)
        assert main(["validate", str(tiny_export), "--quiet"]) == 4
    finally:
        tiny_export.write_bytes(kept)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert LAYER in error
    assert main(["validate", str(tiny_export), "--quiet"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["w4a8", "w8a8", "w4a16", "nvfp4", "mxfp8"])
def test_every_preset_passes_the_gate_on_the_cpu(
    tiny_job: Path, begin: Callable[..., Path], tmp_path: Path, preset: str
) -> None:
    output = tmp_path / f"{preset}.onnx"
    begin(tmp_path / f"{preset}.work", preset)
    assert main([str(tiny_job / "tiny.yaml"), *preset_settings(preset), "-o", str(output), "--quiet"]) == 0
    assert read_metrics(tmp_path / f"{preset}.metrics.json")["fidelity"]["passed"]


@pytest.mark.slow
@needs_rtx
def test_outputs_of_one_work_folder_are_validated_each_with_its_own_reference(
    tiny_job: Path, begin: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = [str(tiny_job / "tiny.yaml"), "--quiet"]
    work = begin(tmp_path / "x.work")
    for preset in ("w4a16", "w4a8"):
        shutil.copytree(begin(tmp_path / preset, preset), work, dirs_exist_ok=True)
    assert main([*recipe, "-o", str(tmp_path / "x.onnx")]) == 0
    weights_only = [*preset_settings("w4a16"), "--target", "rtx-sm86"]
    assert main([*recipe, *weights_only, "-o", str(tmp_path / "x.plan")]) == 0
    for output in ("x.onnx", "x.plan"):
        assert main(["validate", str(tmp_path / output), "--quiet"]) == 0
    (tmp_path / "x.plan").write_bytes(b"another engine")
    assert main(["validate", str(tmp_path / "x.plan"), "--quiet"]) == 4
    assert main([*recipe, *preset_settings("w4a8"), "-o", str(tmp_path / "x.onnx"), "--no-validate"]) == 0
    capsys.readouterr()
    assert main(["validate", str(tmp_path / "x.onnx"), "--quiet"]) == 2
    assert "--no-validate" in capsys.readouterr().err


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize(
    ("preset", "target", "code"),
    [
        ("w4a8", "rtx-sm86", 2),
        ("w4a8", "rtx-sm89", 0),
        ("w8a8", "rtx-sm120", 0),
        ("w4a16", "rtx-sm86", 0),
        ("nvfp4", "rtx-sm89", 2),
    ],
)
def test_presets_on_gpus_are_built_or_refused_by_name(
    tiny_job: Path,
    begin: Callable[..., Path],
    tmp_path: Path,
    preset: str,
    target: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if code == 0:
        # Of these presets only w4a8 has other group multipliers on a GPU.
        begin(tmp_path / "x.work", preset, target if preset == "w4a8" else "cpu")
    arguments = [str(tiny_job / "tiny.yaml"), *preset_settings(preset), "--quiet"]
    assert main([*arguments, "--target", target, "-o", str(tmp_path / "x.plan")]) == code
    if code:
        error = capsys.readouterr().err
        assert "transformer_blocks.0." in error
        assert "targets that can: " in error


@pytest.mark.slow
@needs_rtx
def test_an_nvfp4_engine_is_validated_by_its_numbers_in_other_types(
    tiny_job: Path, begin: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, stand_in = tmp_path / "x.plan", tmp_path / "x.work" / "emulated.rtx-sm120.onnx"
    begin(tmp_path / "x.work", "nvfp4")
    recipe = [str(tiny_job / "tiny.yaml"), *preset_settings("nvfp4"), "--target", "rtx-sm120"]
    assert main([*recipe, "-o", str(plan), "--quiet"]) == 0
    assert main(["validate", str(plan)]) == 0
    assert "emulated.rtx-sm120.onnx, which has the engine's numbers in types" in " ".join(
        capsys.readouterr().err.split()
    )
    model = onnx.load(stand_in)
    tensor = next(t for t in model.graph.initializer if t.name.startswith(f"{LAYER}.tensor_scale"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    onnx.save(model, tmp_path / "tampered.onnx")
    gate = tmp_path / "x.work" / "gate.rtx-sm120"
    with pytest.raises(FidelityError, match=LAYER):
        validate_output(plan, gate, tmp_path / "tampered.onnx", NullProgress(), built_sha256=sha256_of(plan))


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize("target", ["rtx-sm86", "rtx-sm89", "rtx-sm120"])
def test_plans_are_real_engines(tiny_export: Path, tiny_job: Path, tmp_path: Path, target: str) -> None:
    plan = tmp_path / f"{target}.plan"
    work = tiny_export.with_name("tiny.work")
    arguments = [str(tiny_job / "tiny.yaml"), "-o", str(plan), "--target", target, "--work-dir", str(work), "--quiet"]
    assert main(arguments) == 0
    metrics = read_metrics(tmp_path / f"{target}.metrics.json")
    assert metrics["target"] == target
    assert metrics["fidelity"]["passed"]
    assert plan.read_bytes()[:4] == b"vtrt"
    assert main(["validate", str(plan), "--quiet"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_a_missing_builder_ends_with_3_and_keeps_the_lowered_graph(
    tiny_export: Path, tiny_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "orin.plan"
    work = tiny_export.with_name("tiny.work")
    arguments = [str(tiny_job / "tiny.yaml"), "-o", str(plan), "--target", "orin", "--work-dir", str(work), "--quiet"]
    assert main(arguments) == 3
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert str(work / "lowered.orin.onnx") in error
    assert "fp4export build" in error
    onnx.checker.check_model(onnx.load(work / "lowered.orin.onnx"), full_check=True)
    assert not plan.exists()
