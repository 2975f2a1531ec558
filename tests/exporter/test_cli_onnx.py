"""ONNX files on the command line: told from recipes, quantized, looked into."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.cli import main
from tests.exporter.onnx_input.models import export_dit, matmul_and_add, save


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_dit(tmp_path_factory.mktemp("dit") / "dit.onnx")


def test_a_model_is_quantized_and_the_result_looked_into(
    dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.onnx"
    options = ["--format", "e2m1", "--group", "32", "--keep", "*.to_k"]
    assert main(["-o", str(output), str(dit), *options]) == 0
    captured = capsys.readouterr()
    facts = dict(line.split(maxsplit=1) for line in captured.out.splitlines())
    assert facts["quantized"].startswith("8 linear layers (e2m1/e2m3")
    assert facts["kept"].startswith("6 linear layers")
    assert "dB against dit.onnx, on random inputs" in facts["SNR"]
    assert facts["engine"] == str(output)
    assert "kept in high precision: blocks.0.to_k [64 x 64]: --keep *.to_k" in captured.err
    assert "fidelity: passed" in captured.err
    assert main(["inspect", str(output), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["totals"]["quantized_layers"] == 8
    assert main(["inspect", str(output)]) == 0
    assert "8 quantized layers" in capsys.readouterr().out
    assert main(["validate", str(output)]) == 2
    assert "made from an ONNX model" in capsys.readouterr().err


def test_a_dry_run_lists_every_layer_and_writes_nothing(
    dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(dit), "--format", "e2m1", "--group", "32", "-o", str(tmp_path / "o.plan"), "--target", "rtx-sm89"]
    assert main([*words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    for fact in ("10 quantized layers", "4 linear layers in high precision", "final_layer embeds", "rtx-sm89"):
        assert fact in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry", [True, False])
def test_turing_takes_no_onnx_model(dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: bool) -> None:
    words = [str(dit), "--format", "e2m1", "-o", str(tmp_path / "o.plan"), "--target", "rtx-sm75"]
    assert main(words + ["--dry-run"] * dry) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rtx-sm75 has no matrix product with an FP32 result" in error
    assert "recipe with `compute: fp16`, or use --target rtx-sm80" in error
    assert list(tmp_path.iterdir()) == []


def test_without_validation_and_quietly(dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(dit), "--format", "e2m1", "--group", "64", "-o", str(tmp_path / "o.onnx"), "--work-dir"]
    assert main([*words, str(tmp_path / "W"), "--no-validate", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert (tmp_path / "W" / "lowered.cpu.onnx").is_file()
    assert not (tmp_path / "W" / "gate.cpu").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m.onnx", "-o", "o.onnx"], "m.onnx: is not quantized; say which weight format it gets"),
        (["m.onnx", "-o", "o.onnx", "--format", "e2m4"], "unknown format 'e2m4'; did you mean"),
        (["m.onnx", "-o", "o.onnx", "--format", "e2m1", "--seed", "3"], "--seed belongs to a recipe"),
        (["m.onnx", "-o", "o.onnx", "--format", "e2m1", "--set=a.b=c"], "--set belongs to a recipe"),
        (["m.onnx", "-o", "o.onnx", "--format", "e2m1", "--fresh"], "--fresh belongs to a recipe"),
        (["m.onnx", "-o", "o.onnx", "--format", "e2m1", "--resume"], "--resume belongs to a recipe"),
        (["digits", "-o", "o.onnx", "--format", "e2m1"], "--format belongs to an ONNX model"),
        (["digits", "-o", "o.onnx", "--keep", "m.onnx"], "--keep belongs to an ONNX model"),
        (["m.onnx", "--format", "e2m1"], "Missing option '-o'"),
        (["m.onnx", "-o", "o.plan", "--format", "e2m1", "--target", "cpu"], "target cpu is written as .onnx"),
        (["m.onnx", "-o", "o.onnx", "--format", "e2m1", "--keep", "fd"], "--keep 'fd' matches no linear layer"),
        (["m.onnx", "-o", "absent/o.onnx", "--format", "e2m1", "--group", "32"], "the folder absent does not exist"),
        (["absent.onnx", "-o", "o.onnx", "--format", "e2m1"], "absent.onnx: cannot be read: No such file"),
        (["text.onnx", "-o", "o.onnx", "--format", "e2m1"], "text.onnx: not an ONNX file"),
        (["inspect", "absent.onnx"], "absent.onnx: no such file"),
        (["inspect", "text.onnx", "--json"], "text.onnx: not an ONNX file"),
        (["inspect"], "Missing argument 'FILE'"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(matmul_and_add(), tmp_path / "m.onnx")
    (tmp_path / "text.onnx").write_text("text")
    before = sorted(tmp_path.iterdir())
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_help_of_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in (
        "MODEL.onnx --format FORMAT -o OUT",
        "Options with MODEL.onnx",
        "--activation",
        "--keep",
        "inspect FILE",
    ):
        assert word in text
    assert main(["model.onnx", "--help"]) == 0
    assert "--no-validate" in capsys.readouterr().out
    assert main(["inspect", "--help"]) == 0
    assert "--json" in capsys.readouterr().out
