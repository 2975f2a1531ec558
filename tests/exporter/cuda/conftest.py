"""The stand-in for libcuda, and layers to run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

STAND_IN = Path(__file__).parents[2] / "plugins" / "kernels" / "stand_in.c"


@pytest.fixture
def libcuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CUDA driver that writes what it is asked for into tmp_path/record, and says that it is a Hopper."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("the stand-in for libcuda is compiled by gcc, which is not here")
    monkeypatch.setenv("STAND_IN_RECORD", str(tmp_path / "record"))
    path = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, STAND_IN], check=True)
    return str(path)
