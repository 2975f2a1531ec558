"""The program that devices have, through the command and on its own: bad input, exit codes, help."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.cli import main as command
from exporter.device.program import main
from tests.exporter.device.lowered_graphs import write_lowered


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lowered(tmp_path_factory.mktemp("lowered"), "rtx-sm89")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "out.onnx"], "out.onnx: target rtx-sm89 is written as"),
        (["-o", "out"], "no suffix"),
        ([], "the following arguments are required: -o/--output"),
        (["-o", "out.plan", "--target", "rtx-sm88"], "did you mean 'rtx-sm89'"),
        (["-o", "out.onnx", "--target", "cpu"], "target cpu needs no engine"),
        (["-o", "out.plan", "--batch", "4:2:1"], "must be positive and ascending"),
        (["-o", "out.plan", "--batch", "many"], "--batch many: must be MIN:BEST:MAX"),
        (["-o", "out.plan", "--workspace", "much"], "--workspace much: must be a size"),
        (["-o", "out.plan", "--gate", "nowhere"], "--gate nowhere: no such folder"),
        (["-o", "no/such/folder/out.plan"], "the folder does not exist"),
        (["-o", "out.plan", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(
    lowered: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(lowered), *words]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]


def test_a_missing_file_and_a_folder_in_place_of_the_output(
    lowered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tmp_path / "none.onnx"), "-o", str(tmp_path / "out.plan")]) == 2
    assert "none.onnx: cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "out.plan").mkdir()
    assert main(["build", str(lowered), "-o", str(tmp_path / "out.plan")]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_the_command_hands_on_words_and_exit_codes(lowered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["build", str(lowered), "-o", "out.plan", "--batch", "x"]) == 2
    assert "--batch x" in capsys.readouterr().err
    assert command(["doctor", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_the_command_s_help_lists_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--help"]) == 0
    text = capsys.readouterr().out
    assert "build MODEL.onnx -o OUT" in text
    assert "doctor [--json]" in text
    assert "Build a lowered graph into an engine" in text


def test_debug_shows_the_traceback(lowered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(lowered), "-o", "out", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_is_told_from_bad_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("exporter.device.doctor.examine", fail)
    assert main(["doctor"]) == 1
    assert "internal: RuntimeError: broken; please report it" in capsys.readouterr().err
