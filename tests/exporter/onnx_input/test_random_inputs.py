"""Random inputs fit the graph's types, shapes and meanings."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.errors import InputError
from exporter.onnx_input.random_inputs import random_inputs

KINDS = {
    "latents": (TensorProto.FLOAT, ["batch", 4, "height"]),
    "half": (TensorProto.FLOAT16, [3]),
    "timestep": (TensorProto.INT64, ["batch"]),
    "t": (TensorProto.FLOAT, [64]),
    "encoder_attention_mask": (TensorProto.INT64, ["batch", 5]),
    "flags": (TensorProto.BOOL, [2]),
    "labels": (TensorProto.INT32, [100]),
    "positions": (TensorProto.INT64, [100]),
}


def model_of(kinds: dict[str, tuple[int, list[int | str] | None]]) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in kinds.items()]
    table = numpy_helper.from_array(np.zeros((7, 3), np.float32), "table")
    nodes = [
        helper.make_node("Unsqueeze", ["labels", "axes"], ["u"]),
        helper.make_node("Gather", ["table", "u"], ["y"]),
    ]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, [], [table]))


def test_arrays_fit_types_shapes_and_names() -> None:
    arrays = random_inputs(model_of(KINDS), "m")
    assert {name: array.shape for name, array in arrays.items()} == {
        "latents": (2, 4, 2),
        "half": (3,),
        "timestep": (2,),
        "t": (64,),
        "encoder_attention_mask": (2, 5),
        "flags": (2,),
        "labels": (100,),
        "positions": (100,),
    }
    assert arrays["half"].dtype == np.float16
    assert arrays["t"].dtype == np.float32
    assert arrays["t"].max() > 100
    assert set(arrays["encoder_attention_mask"].ravel()) == {1}
    assert arrays["flags"].all()
    assert set(arrays["labels"]) == set(range(7))
    assert set(arrays["positions"]) == {0, 1}


def test_the_same_seed_gives_the_same_arrays() -> None:
    first, second, other = (random_inputs(model_of(KINDS), "m", seed)["latents"] for seed in (0, 0, 1))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("kind", [(TensorProto.STRING, [2]), (TensorProto.FLOAT, None)])
def test_inputs_that_cannot_be_made_up_are_named(kind: tuple[int, list[int | str] | None]) -> None:
    with pytest.raises(InputError, match=r"input 'prompt' is no tensor of numbers.*--no-validate"):
        random_inputs(model_of({"prompt": kind}), "m")
