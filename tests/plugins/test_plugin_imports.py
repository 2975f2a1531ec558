"""What importing plugins/ costs: a machine that only builds or runs an engine has no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import plugins

FORBIDDEN = ("torch", "tensorrt", "tensorrt_rtx", "triton", "exporter", "onnxruntime", "onnx_graphsurgeon", "diffusers")


def is_device_code(path: Path) -> bool:
    """Functions that Triton compiles are in a room's kernel.py and in device_*.py, which no other module imports."""
    return path.name == "kernel.py" or path.name.startswith("device_")


def test_importing_every_module_loads_no_heavy_package() -> None:
    root = Path(plugins.__file__).parent
    files = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py") if not is_device_code(path)]
    modules = sorted(".".join(path.parts).removesuffix(".__init__") for path in files)
    assert "plugins.op" in modules
    program = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
print(sorted(set({FORBIDDEN}) & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root.parent
    )
    assert result.stdout.strip() == "[]"
