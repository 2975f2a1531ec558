"""W4A8 with INT8 activations on CPUs with and without VNNI: exact, or refused in one line before any work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from exporter import this_cpu
from exporter.cli import main
from exporter.container_choice import container_product, needs_vnni
from exporter.device.machine import saturates_int8_products
from exporter.errors import EnvironmentLacksError
from exporter.metrics import read_metrics
from exporter.onnx_input.job import quantize_onnx
from exporter.onnx_input.selection import FormatOptions
from exporter.passes.layer_table import read_layer_table
from exporter.presets import PRESETS
from exporter.targets import TARGETS
from exporter.this_cpu import product_of, refuse_saturating_cpu
from plugins.containers import INT8
from tests.exporter.conftest import preset_settings
from tests.exporter.device.lowered_graphs import write_lowered
from tests.exporter.onnx_input.models import matmul_and_add, save

W4A6, W4A8 = ({"fc": container_product(PRESETS[name], 1152, INT8)} for name in ("w4a6", "w4a8_int"))


def test_only_what_saturates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_cpu, "saturates_int8_products", lambda: True)
    refuse_saturating_cpu(W4A6, TARGETS["cpu"], "x.yaml")
    refuse_saturating_cpu(W4A8, TARGETS["rtx-sm86"], "x.yaml")
    refuse_saturating_cpu({"fc": None}, TARGETS["cpu"], "x.yaml")
    with pytest.raises(EnvironmentLacksError, match=r"^x\.yaml: 1 layers \(fc first\).*VNNI.*w4a6.*--no-validate$"):
        refuse_saturating_cpu(W4A6 | W4A8, TARGETS["cpu"], "x.yaml")
    monkeypatch.setattr(this_cpu, "saturates_int8_products", lambda: False)
    refuse_saturating_cpu(W4A8, TARGETS["cpu"], "x.yaml")


@pytest.mark.parametrize("activation_format", ["e2m3", "int8"])
def test_a_graph_s_layers_are_judged_by_its_table(tmp_path: Path, activation_format: str) -> None:
    (entry,) = read_layer_table(onnx.load(write_lowered(tmp_path, "cpu", activation_format)))
    assert needs_vnni(product_of(entry)) == (activation_format == "int8")


@pytest.mark.slow
def test_int8_activations_pass_the_gate_or_are_refused_before_any_work(
    tiny_job: Path, begin: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, work = tmp_path / "x.onnx", tmp_path / "x.work"
    command = [str(tiny_job / "tiny.yaml"), "-o", str(output), "--quiet", *preset_settings("w4a8_int")]
    if not saturates_int8_products():
        begin(work, "w4a8_int")
        assert main(command) == 0
        assert read_metrics(tmp_path / "x.metrics.json")["fidelity"]["passed"]
        return
    assert main(command) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "VNNI" in error
    assert [path.name for path in work.iterdir()] == ["lock"]
    shutil.rmtree(work)
    begin(work, "w4a8_int")
    assert main([*command, "--no-validate"]) == 0
    assert main(["validate", str(output)]) == 2


def test_an_onnx_model_is_refused_likewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_cpu, "saturates_int8_products", lambda: True)
    model = save(matmul_and_add(), tmp_path / "model.onnx")
    options = FormatOptions("e2m1", activation="int8", group=32)
    with pytest.raises(EnvironmentLacksError, match=r"model\.onnx: 1 layers \(.*VNNI"):
        quantize_onnx(model, tmp_path / "out.onnx", options)
    assert not (tmp_path / "out.onnx").exists()
    assert quantize_onnx(model, tmp_path / "out.onnx", options, validate=False).fidelity is None


@pytest.mark.slow
def test_a_finished_file_is_not_judged_by_a_cpu_that_saturates(
    tiny_export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the file had come from a machine with VNNI."""
    monkeypatch.setattr(this_cpu, "saturates_int8_products", lambda: True)
    monkeypatch.setattr(this_cpu, "needs_vnni", lambda product: product is not None)
    assert main(["validate", str(tiny_export), "--quiet"]) == 3
    assert "VNNI" in capsys.readouterr().err
