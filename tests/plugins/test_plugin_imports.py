"""What importing plugins/ costs: a machine that only builds or runs an engine has no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import plugins

FORBIDDEN = ("torch", "tensorrt", "tensorrt_rtx", "triton", "exporter", "onnxruntime", "onnx_graphsurgeon", "diffusers")


def test_importing_every_module_loads_no_heavy_package() -> None:
    root = Path(plugins.__file__).parent
    files = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")]
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
