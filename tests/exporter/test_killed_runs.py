"""Work that was finished before a run was killed is never lost, and never mixed with another recipe's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exporter.cli import main
from tests.exporter.kill_runs import SETTINGS, calibrate
from tests.exporter.progresses import InterruptedProgress

ROOT = Path(__file__).parents[2]
ALSO_THE_LAST = (
    "{match: proj_out, group: 0, scales: channel}, "
    '{match: "*.ff.net.0.proj", weight: e3m0, scales: channel}, {match: "transformer_blocks.*", group: 32}'
)


def _files(work: Path) -> dict[Path, bytes]:
    return {path.relative_to(work): path.read_bytes() for path in work.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_killed_at_random_moments_the_same_run_ends_with_the_same_bytes(tiny_job: Path, tmp_path: Path) -> None:
    recipe, killed, whole = tiny_job / "tiny.yaml", tmp_path / "killed.onnx", tmp_path / "whole.onnx"
    begin = time.perf_counter()
    calibrate(recipe, whole)
    seconds = time.perf_counter() - begin
    said = _killed(recipe, killed, "calibrate", f"{seconds:.3f}", "sealing")
    files, expected = (_files(output.with_suffix(".work")) for output in (killed, whole))
    lock = Path("lock")
    assert files.pop(lock) != expected.pop(lock)
    assert files == expected, said


@pytest.mark.slow
def test_killed_behind_the_calibration_an_export_ends_with_the_same_bytes(
    tiny_job: Path, tiny_export: Path, tmp_path: Path
) -> None:
    """Of a finished run all but what was calibrated is taken away; a run that is killed on its way makes it again."""
    output, work = tmp_path / tiny_export.name, tmp_path / "tiny.work"
    finished = tiny_export.with_suffix(".work")
    work.mkdir()
    for path in [*finished.glob("calibration.*"), *finished.glob("quantized.*")]:
        shutil.copy(path, work)
    begun = set(_files(work))
    said = _killed(tiny_job / "tiny.yaml", output, "export", "sealed")
    made = {path: content for path, content in _files(work).items() if path.suffix != ".json" and path != Path("lock")}
    assert made.keys() - begun >= {Path("held_out.safetensors"), Path("samples.safetensors"), Path("lowered.cpu.onnx")}
    assert made == {path: (finished / path).read_bytes() for path in made}, said
    assert output.read_bytes() == tiny_export.read_bytes(), said


def _killed(recipe: Path, output: Path, work: str, *moments: str) -> str:
    """What is said by so many runs that are killed, and by the one that finishes their work."""
    command = [sys.executable, "-m", "tests.exporter.kill_runs", str(recipe), str(output), work, *moments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("killed") == len(moments)
    return run.stdout


def test_an_interrupted_calibration_is_not_lost_to_another_recipe(
    tiny_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, output, work = tiny_job / "tiny.yaml", tmp_path / "x.onnx", tmp_path / "x.work"
    # Steps of capturing, of the scales of all layers, of their error feedback, and of the first block.
    with pytest.raises(KeyboardInterrupt):
        calibrate(recipe, output, InterruptedProgress(3 + 20 + 20 + 4))
    before = _files(work)
    for change, words in {
        "calibration.steps=4": r"had calibration\.steps 3, not 4",
        "method.iterations=7": r"had method\.iterations 6, not 7",
        "preset=w4a8_int": r"had transformer_blocks\.0\.attn1\.to_q: activation e2m3, not int8; .*; and 17 more",
        "layers.0.weight=e1m2": r"had transformer_blocks\.0\.ff\.net\.0\.proj: weight e3m0, not e1m2; .*",
        "layers.1.group=16": r"had transformer_blocks\.0\.attn1\.to_q: group 32, not 16; .*",
        f"layers=[{ALSO_THE_LAST}]": r"had proj_out in high precision, not quantized",
    }.items():
        changes = [word for setting in (*SETTINGS, change) for word in ("--set", setting)]
        assert main([str(recipe), "-o", str(output), "--quiet", *changes]) == 2
        error = capsys.readouterr().err
        assert re.search(
            f"{words}: change that back to go on with it, .*--work-dir .*--fresh to throw it away\n", error
        )
        assert error.count("\n") == 1
    assert before == _files(work)
    rest = InterruptedProgress()
    calibrate(recipe, output, rest)
    blocks = [f"calibrate transformer_blocks.{number}" for number in range(2)]
    assert rest.begun == ["scales", "error feedback", *blocks]
    assert not any(work.glob("unfinished.*"))
