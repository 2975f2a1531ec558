"""A hand-made bundle with weights in a file of their own, kernels and acceptance files, in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.bundle.manifest import Acceptance, Manifest, TargetEntry, WeightsEntry
from exporter.bundle.write import listed_files, seal


def graph_with_external_data(location: str, offset: int | str = 0, length: int = 64) -> onnx.ModelProto:
    """y = x + w, w's 16 floats in a file called `location`."""
    weight = numpy_helper.from_array(np.arange(16, dtype=np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [16]) for name in ("x", "y")]
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    return helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], [weight]))


def target_entry(name: str, capability: tuple[int, int] | None, kernels: str | None = None) -> TargetEntry:
    engine = "onnxruntime" if capability is None else "tensorrt"
    acceptance = Acceptance("gate/inputs.json", "gate/reference.json", "gate/result.json", 40.5)
    return TargetEntry(name, engine, capability, "fp32", "exported.onnx", f"lowered.{name}.onnx", kernels, acceptance)


def fill(folder: Path) -> None:
    """Everything but the manifest."""
    (folder / "gate").mkdir(parents=True)
    (folder / "lowered.h100.kernels").mkdir()
    for name in ("exported.onnx", "lowered.h100.onnx", "lowered.cpu.onnx"):
        onnx.save(graph_with_external_data("weights.data"), folder / name)
    (folder / "weights.data").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    for name in ("recipe.yaml", "README.md", "gate/inputs.json", "gate/reference.json", "gate/result.json"):
        (folder / name).write_text(f"{name}\n")
    (folder / "lowered.h100.kernels" / "k.ptx").write_text(".version 8.5\n")


def manifest_of(folder: Path) -> Manifest:
    weights = WeightsEntry("model", "unknown", None, None, {"a.safetensors": "0" * 64})
    targets = (target_entry("h100", (9, 0), "lowered.h100.kernels"), target_entry("cpu", None))
    return Manifest("tiny", "recipe.yaml", weights, {"fp4export": "0"}, targets, listed_files(folder))


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    """A bundle that is as it should be."""
    folder = tmp_path / "tiny.bundle"
    fill(folder)
    seal(folder, manifest_of(folder))
    return folder
