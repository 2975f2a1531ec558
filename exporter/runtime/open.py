"""Opening an exported file in the runtime that its suffix says."""

from __future__ import annotations

from pathlib import Path

import torch

from exporter.errors import InputError
from exporter.runtime.engine import Engine
from exporter.runtime.onnxruntime_engine import OnnxRuntimeEngine
from exporter.runtime.tensorrt_engine import open_tensorrt
from exporter.targets import SUFFIXES


def open_engine(path: Path, device: str | None = None, threads: int | None = None) -> Engine:
    """The engine in a file; `device` is by default the CPU for .onnx and the GPU for the others.

    Raises `InputError` for a file that is missing or no output, `EnvironmentLacksError` where its runtime or its
    device is not here.
    """
    check_output_file(path)
    place = parse_device(device or default_device(path))
    is_graph = path.suffix in SUFFIXES["onnxruntime"]
    return OnnxRuntimeEngine(path, place, threads) if is_graph else open_tensorrt(path, place)


def check_output_file(path: Path) -> None:
    """Raise `InputError` unless `path` is a file that can be an output."""
    if path.is_dir():
        raise InputError(
            f"{path}: is a folder; expected an .onnx, .plan or .engine (an engine is made of a bundle by "
            f"fp4export build {path} -o NAME.plan, on the device)"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an .onnx, .plan or .engine that fp4export wrote")
    if path.suffix not in (*SUFFIXES["onnxruntime"], *SUFFIXES["tensorrt"]):
        raise InputError(f"{path}: unknown suffix {path.suffix!r}; expected .onnx, .plan or .engine")


def default_device(path: Path) -> str:
    """Where a file runs unless it is said: graphs on the CPU, engines on the GPU."""
    return "cpu" if path.suffix in SUFFIXES["onnxruntime"] else "cuda"


def parse_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N` as torch's device. Raises `InputError`."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: not a device; expected cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: engines run on cpu or cuda")
    return device
