"""The GPU that something was measured on, in a line."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import version

import torch

from exporter.gpu import local_gpu


def machine() -> str:
    """GPU, driver and versions."""
    gpu = local_gpu()
    newest = "unknown" if gpu is None else "{}.{}".format(*gpu.cuda)
    capability = "{}.{}".format(*torch.cuda.get_device_capability(0))
    return (
        f"{torch.cuda.get_device_name(0)}, compute capability {capability}; driver {driver_version()} (up to CUDA "
        f"{newest}); torch {torch.__version__}, Triton {version('triton')}"
    )


def driver_version() -> str:
    """As nvidia-smi says it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "of unknown version"
    arguments = [command, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(arguments, capture_output=True, text=True, check=False).stdout.strip() or "of unknown version"
