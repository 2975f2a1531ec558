"""What an ONNX model is turned into besides the usual: outputs that are refused, other targets, other operators."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from exporter.errors import InputError
from exporter.onnx_files import data_path, save_onnx
from exporter.onnx_input.job import OnnxResult, load_source, quantize_onnx
from exporter.onnx_input.selection import FormatOptions
from exporter.passes import lowering_passes, run_passes
from exporter.targets import TARGETS
from tests.exporter.onnx_input.models import WIDTH, HandMade, save

LOSSLESS = FormatOptions("e2m1", activation="none", scales="channel")


def _layer(made: HandMade) -> str:
    return made.node("MatMul", "x", made.on_grid("fc.weight", WIDTH, 32), output="y")


def quantized(model: onnx.ModelProto, folder: Path, options: FormatOptions = LOSSLESS) -> OnnxResult:
    return quantize_onnx(save(model, folder / "model.onnx"), folder / "out.onnx", options)


@pytest.mark.parametrize(("activation", "container"), [("e4m3", "fp8"), ("none", "int8")])
def test_another_target_chooses_its_own_containers(activation: str, container: str, tmp_path: Path) -> None:
    made = HandMade()
    options = FormatOptions("e2m1", activation, scales="channel")
    result = quantized(made.model(_layer(made)), tmp_path, options)
    assert [layer.container for layer in result.selection.layers] == ["fp32"]
    exported = result.work_dir / "exported.cpu.onnx"
    target = TARGETS["rtx-sm89"]
    loaded = load_source(exported, None, target)
    assert [layer.container for layer in loaded.selection.layers] == [container]
    run_passes(loaded.model, lowering_passes(target), target)
    assert load_source(exported, None, TARGETS["cpu"]).selection.layers[0].container == "fp32"


@pytest.mark.parametrize("operator", ["FastGelu", "NoSuchGelu"])
def test_onnx_runtime_s_own_operators_run_where_it_has_them(operator: str, tmp_path: Path) -> None:
    made = HandMade()
    hidden = made.node("MatMul", "x", made.on_grid("fc.weight", WIDTH, 32), output="h")
    model = made.model(made.node(operator, hidden, output="y", domain="com.microsoft"), extra_domain="com.microsoft")
    if operator == "FastGelu":
        assert (quantized(model, tmp_path).snr_db or 0) > 100
    else:
        with pytest.raises(InputError, match="NoSuchGelu"):
            quantized(model, tmp_path)


def test_no_other_name_of_the_model_or_its_weights_is_written_to(tmp_path: Path) -> None:
    made = HandMade()
    save_onnx(made.model(_layer(made)), tmp_path / "out.onnx", largest=0)
    source = (tmp_path / "out.onnx").rename(tmp_path / "model.onnx")
    (tmp_path / "d").mkdir()
    (tmp_path / "link.onnx").symlink_to(source)
    (tmp_path / "hard.onnx").hardlink_to(source)
    before = {path: path.read_bytes() for path in (source, data_path(tmp_path / "out.onnx"))}
    for other in ("d/../model.onnx", "link.onnx", "hard.onnx"):
        with pytest.raises(InputError, match="is the model itself"):
            quantize_onnx(source, tmp_path / other, LOSSLESS)
    with pytest.raises(InputError, match=r"out\.onnx: would write out\.onnx\.data, which .*model\.onnx is made of"):
        quantize_onnx(source, tmp_path / "out.onnx", LOSSLESS)
    assert {path: path.read_bytes() for path in before} == before
