"""An output remembers its work folder, and says so when that folder no longer speaks for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from exporter.errors import InputError
from exporter.files import sha256_of
from exporter.gate.records import TENSORS
from exporter.origin import Origin

GATE_FOLDER = "gate.cpu"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output with a work folder that holds a reference."""
    gate = tmp_path / "home" / "x.work" / GATE_FOLDER
    gate.mkdir(parents=True)
    (gate / TENSORS).write_bytes(b"reference")
    (gate.parent / "lowered.cpu.onnx").write_bytes(b"graph")
    path = tmp_path / "home" / "x.onnx"
    path.write_bytes(b"output")
    Origin.of(path, gate.parent / "lowered.cpu.onnx", gate).save(path)
    return path


def test_it_comes_back_as_it_was_saved(output: Path) -> None:
    origin = Origin.load(output)
    assert origin.graph == output.with_name("x.work") / "lowered.cpu.onnx"
    assert origin.gate == output.with_name("x.work") / GATE_FOLDER
    assert origin.output_sha256 == sha256_of(output)


def test_a_folder_moved_along_with_the_output_is_found(output: Path, tmp_path: Path) -> None:
    moved = shutil.move(output.parent, tmp_path / "elsewhere")
    assert Origin.load(Path(moved) / "x.onnx").gate.is_dir()


def test_what_no_longer_speaks_for_the_output_is_refused(output: Path) -> None:
    reference = output.with_name("x.work") / GATE_FOLDER / TENSORS
    reference.write_bytes(b"another export's")
    with pytest.raises(InputError, match="holds another export"):
        Origin.load(output)
    shutil.rmtree(output.with_name("x.work"))
    with pytest.raises(InputError, match="is gone"):
        Origin.load(output)


def test_an_engine_whose_graph_was_replaced_is_refused(output: Path) -> None:
    plan = output.with_suffix(".plan")
    plan.write_bytes(b"engine")
    work = output.with_name("x.work")
    Origin.of(plan, work / "lowered.cpu.onnx", work / GATE_FOLDER).save(plan)
    assert Origin.load(plan).graph == work / "lowered.cpu.onnx"
    (work / "lowered.cpu.onnx").write_bytes(b"another target's graph")
    with pytest.raises(InputError, match="holds another export"):
        Origin.load(plan)
    assert Origin.load(output).output_sha256 == sha256_of(output)


def test_a_copy_uses_the_folder_that_was_copied_with_it(output: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(output.parent, tmp_path / "copy"))
    assert Origin.load(copy / "x.onnx").gate.parent == copy / "x.work"


def test_without_validation_there_is_no_reference(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"output")
    (tmp_path / "x.work").mkdir()
    (tmp_path / "x.work" / "lowered.cpu.onnx").write_bytes(b"graph")
    Origin.of(path, tmp_path / "x.work" / "lowered.cpu.onnx", None).save(path)
    with pytest.raises(InputError, match="--no-validate"):
        Origin.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"work_dir": 1}'])
def test_a_damaged_or_missing_file_is_an_input_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.onnx"
    if text:
        (tmp_path / "x.onnx.origin.json").write_text(text)
    with pytest.raises(InputError, match=r"origin\.json"):
        Origin.load(path)
