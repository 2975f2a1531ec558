"""`build` and `doctor` in an interpreter in which nothing but numpy, onnx, polygraphy and TensorRT can be imported.

A finder refuses every other installed package, in the command's process and in those that it starts. That proves what
is imported on the paths that run here; a machine that really lacks the packages may differ in what those three need.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.exporter.device.lowered_graphs import write_lowered

ROOT = Path(__file__).parents[3]

# google.protobuf, ml_dtypes and typing_extensions come with onnx; the libraries and bindings with tensorrt-rtx.
ALLOWED = {
    "numpy",
    "onnx",
    "google",
    "ml_dtypes",
    "typing_extensions",
    "polygraphy",
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "tensorrt_rtx_libs",
    "exporter",
    "plugins",
}
FINDER = """
import sys

ALLOWED = {allowed!r} | set(sys.stdlib_module_names)


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"No module named {{name!r}} (refused)", name=name)


sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of such an interpreter: `sitecustomize` is imported by every Python that is started in it."""
    folder = tmp_path_factory.mktemp("device")
    (folder / "sitecustomize.py").write_text(FINDER.format(allowed=ALLOWED))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def fp4export(device: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "exporter", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=device, cwd=ROOT)


def test_the_finder_refuses(device: dict[str, str]) -> None:
    for package in ("torch", "pydantic", "click", "rich", "safetensors", "onnxruntime", "onnx_graphsurgeon", "yaml"):
        answer = subprocess.run([sys.executable, "-c", f"import {package}"], env=device, capture_output=True, text=True)
        assert "ModuleNotFoundError" in answer.stderr, package


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra 'rtx'")
def test_an_engine_is_built(device: dict[str, str], tmp_path: Path) -> None:
    lowered = write_lowered(tmp_path, "rtx-sm89")
    answer = fp4export(device, "build", str(lowered), "-o", str(tmp_path / "out.plan"), "--target", "rtx-sm89")
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "out.plan").read_bytes()[:4] == b"vtrt"
    assert answer.stdout.startswith(f"engine   {tmp_path / 'out.plan'} (")
    assert "memory: weights" in answer.stderr
    assert "\x1b" not in answer.stderr


def test_a_wrong_machine_is_told(device: dict[str, str], tmp_path: Path) -> None:
    lowered = write_lowered(tmp_path, "b200")
    answer = fp4export(device, "build", str(lowered), "-o", str(tmp_path / "out.plan"))
    assert answer.returncode == 3
    assert answer.stderr.startswith("error: target b200: ")


def test_the_doctor_answers(device: dict[str, str]) -> None:
    answer = fp4export(device, "doctor", "--json")
    assert answer.returncode == 0, answer.stderr
    assert {entry["target"] for entry in json.loads(answer.stdout)["targets"]} >= {"cpu", "orin", "rtx-sm89"}


def test_the_help_answers(device: dict[str, str]) -> None:
    for words in (("build", "--help"), ("doctor", "--help")):
        assert fp4export(device, *words).returncode == 0


def test_other_commands_say_what_is_missing(device: dict[str, str]) -> None:
    answer = fp4export(device, "digits", "-o", "out.onnx")
    assert answer.returncode == 3
    assert answer.stderr == "error: click is not installed, so only build and doctor run here: pip install fp4export\n"


def test_the_standard_library_is_enough_for_the_doctor(tmp_path: Path) -> None:
    """Neither TensorRT nor polygraphy nor onnx."""
    (tmp_path / "sitecustomize.py").write_text(FINDER.format(allowed={"exporter", "plugins"}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    answer = fp4export(environment, "doctor")
    assert answer.returncode == 0, answer.stderr
    assert "orin" in answer.stdout
