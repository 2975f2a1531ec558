"""Cutting: given tensors become inputs, what is not needed goes, what is missing is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from exporter.gate.subgraphs import CutError, GivenTensor, cut, given_name
from exporter.onnx_files import save_onnx
from tests.exporter.gate.hand_made import Example

HIDDEN = GivenTensor("blocks.0.output", onnx.TensorProto.FLOAT, 3)


def test_a_given_tensor_is_computed_and_replaced_at_once(example: Example) -> None:
    model = cut(example.model, [HIDDEN], ["blocks.0.output", "sample"])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    record, other = example.reference.models
    feeds = {"x": record.inputs["x"], given_name(HIDDEN.name): other.boundaries["blocks.0.output"]}
    block, sample = session.run(None, feeds)
    assert np.allclose(block, record.boundaries["blocks.0.output"], atol=1e-5)
    assert np.allclose(sample, other.boundaries["sample"], atol=1e-5)


def test_what_is_not_needed_is_left_out(example: Example) -> None:
    model = cut(example.model, [HIDDEN], ["sample"])
    assert [value.name for value in model.graph.input] == [given_name(HIDDEN.name)]
    assert not any(tensor.name.startswith("blocks.0") for tensor in model.graph.initializer)
    assert {function.name for function in model.functions} == {function.name for function in example.model.functions}
    onnx.checker.check_model(save_and_reload(model))


def save_and_reload(model: onnx.ModelProto) -> onnx.ModelProto:
    """Outputs have no declared type; shape inference fills it in, as runtimes do."""
    return onnx.shape_inference.infer_shapes(model)


def test_the_original_is_not_changed(example: Example) -> None:
    before = example.model.SerializeToString()
    cut(example.model, [HIDDEN], ["sample"])
    assert example.model.SerializeToString() == before


@pytest.mark.parametrize("missing", ["given", "wanted"])
def test_a_missing_tensor_is_named(example: Example, missing: str) -> None:
    nowhere = GivenTensor("nowhere", onnx.TensorProto.FLOAT, 3)
    given, wanted = ([nowhere], ["sample"]) if missing == "given" else ([HIDDEN], ["nowhere"])
    with pytest.raises(CutError, match="nowhere"):
        cut(example.model, given, wanted)


def test_a_cut_s_large_weights_go_to_a_file_of_their_own(example: Example, tmp_path: Path) -> None:
    model, path = cut(example.model, [HIDDEN], ["sample"]), tmp_path / "cut.onnx"
    before = model.SerializeToString(deterministic=True)
    for _ in range(2):  # a second run replaces the first one's data
        save_onnx(model, path, largest=100)
    assert (tmp_path / "cut.onnx.data").stat().st_size < 20_000
    assert model.SerializeToString(deterministic=True) == before
    onnxruntime.InferenceSession(str(path))
