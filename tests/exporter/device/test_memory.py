"""The estimate, counted by hand on small graphs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.device.memory import MemoryEstimate, estimate_memory
from exporter.device.sizes import parse_size, size


def _chain() -> onnx.ModelProto:
    """x → a → b → y, each [batch, 256] floats, and w [256] bytes; x is read again at the end."""
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Add", ["b", "x"], ["y"]),
    ]
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 256]) for name in "xaby"}
    weight = numpy_helper.from_array(np.zeros(256, np.int8), "w")
    graph = helper.make_graph(nodes, "g", [values["x"]], [values["y"]], [weight], value_info=[values["a"], values["b"]])
    return helper.make_model(graph)


def test_activations_are_the_most_that_is_alive_at_once() -> None:
    estimate = estimate_memory(_chain(), 4, None)
    assert estimate == MemoryEstimate(weights=256, activations=3 * 4 * 1024, workspace=None, batch=4, unknown=0)
    assert estimate_memory(_chain(), 8, 1 << 20).total == 256 + 3 * 8 * 1024 + (1 << 20)


def test_tensors_of_unknown_size_are_counted_and_told() -> None:
    model = _chain()
    del model.graph.value_info[:]
    estimate = estimate_memory(model, 1, None)
    assert estimate.unknown == 2
    assert "2 tensors of unknown size left out" in estimate.sentence(None)


def test_four_bit_weights_count_half_a_byte() -> None:
    model = _chain()
    model.graph.initializer.append(TensorProto(name="q", data_type=TensorProto.INT4, dims=[3, 3], raw_data=bytes(5)))
    assert estimate_memory(model, 1, None).weights == 256 + 5


def test_the_sentence_says_what_it_is_based_on() -> None:
    text = estimate_memory(_chain(), 4, 1 << 30).sentence(3 << 30)
    assert "weights 256 B" in text
    assert "at batch 4 (the graph's own tensors, nothing fused)" in text
    assert "workspace 1.00 GiB; 3.00 GiB free" in text


@pytest.mark.parametrize(
    ("text", "count"),
    [("512M", 512 << 20), ("2G", 2 << 30), ("1.5GiB", 3 << 29), ("64kb", 64 << 10)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "2", "G", "-1G", "1.2.3G", "0G", "two", "1T", "²G"])
def test_what_is_no_size(text: str) -> None:
    assert parse_size(text) is None


def test_sizes_in_words() -> None:
    assert [size(count) for count in (5, 2048, 3 << 20, 5 << 29)] == ["5 B", "2.00 KiB", "3.00 MiB", "2.50 GiB"]
