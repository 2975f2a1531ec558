"""TensorRT's real Python bindings and plugin registry on a machine without TensorRT; what this CPU computes exactly."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.device.machine import saturates_int8_products

ROOT = Path(__file__).resolve().parents[1]

# The symbols that the bindings need of TensorRT; the plugin registry and the runtime are the lean library's.
_INFER = "void *createInferBuilder_INTERNAL(void) { return 0; }\nvoid *getBuilderPluginRegistry(void) { return 0; }\n"
_PLUGIN = "int initLibNvInferPlugins(void) { return 1; }\n"
_PARSER = (
    "void *createNvOnnxParser_INTERNAL(void) { return 0; }\n"
    "void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }\n"
    "int getNvOnnxParserVersion(void) { return 0; }\n"
)
SHIMS = {"nvinfer": _INFER, "nvinfer_plugin": _PLUGIN, "nvonnxparser": _PARSER}


def _missing() -> str:
    for package in ("tensorrt_bindings", "tensorrt_lean_libs"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (extra: dev, on Linux)"
    return "" if shutil.which("gcc") else "no gcc"


@pytest.fixture(scope="session")
def exact_int8_products() -> None:
    """Skip what x86 CPUs compute exactly with VNNI only."""
    if saturates_int8_products():
        pytest.skip("this CPU has no VNNI: pairs of products of INT8 activations saturate in 16 bits")


@pytest.fixture(scope="session")
def shims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what stands for the libraries that TensorRT's bindings are linked to."""
    reason = _missing()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("shims")
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    assert spec is not None
    assert spec.origin is not None
    lean = Path(spec.origin).parent
    (library,) = lean.glob("libnvinfer_lean.so.*")
    major = library.suffix
    for name, source in SHIMS.items():
        output = f"lib{name}.so{major}"
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / output), f"-Wl,-soname,{output}"]
        if name == "nvinfer":
            command += ["-Wl,--no-as-needed", f"-L{lean}", f"-l:{library.name}", f"-Wl,-rpath,{lean}"]
        subprocess.run(command, input=source, text=True, check=True)
    return folder


@pytest.fixture(scope="session")
def in_tensorrt(shims: Path) -> Callable[[Any], Any]:
    """What `drive.main` returns for a job, in a process that has the bindings."""

    def run(argument: Any) -> Any:
        result = subprocess.run(
            [sys.executable, "-m", "tests.plugins.tensorrt_plugins.drive", str(shims), json.dumps(argument)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run
