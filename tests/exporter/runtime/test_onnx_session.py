"""Running graphs: the right numbers, and one-line errors for what does not fit."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.errors import InputError
from exporter.onnx_files import read_model
from exporter.runtime import OnnxSession

COUNT, FEATURES = 64, 24


def _model(
    nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto], output_type: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", COUNT])
    mask = helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1])
    y = helper.make_tensor_value_info("y", output_type, ["batch", None])
    graph = helper.make_graph(nodes, "g", [x, mask], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _double() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Mul", ["x", "mask"], ["masked"]),
        helper.make_node("Add", ["masked", "masked"], ["y"]),
    ]
    return _model(nodes, [])


def _feeds(batch: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((batch, COUNT)).astype(np.float32),
        "mask": np.ones((batch, 1), np.float32),
    }


def test_model_and_file_give_the_same(tmp_path: Path) -> None:
    onnx.save(_double(), tmp_path / "m.onnx")
    for source in (_double(), tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        results = OnnxSession(source, threads=1).run(_feeds())
        assert list(results) == ["y"]
        assert np.array_equal(results["y"], 2 * _feeds()["x"])


def test_signature_is_known() -> None:
    session = OnnxSession(_double())
    assert [(spec.name, spec.dtype, spec.shape) for spec in session.inputs] == [
        ("x", np.dtype(np.float32), ("batch", COUNT)),
        ("mask", np.dtype(np.float32), ("batch", 1)),
    ]
    assert [spec.name for spec in session.outputs] == ["y"]


def test_external_weights_are_found_beside_the_file(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(COUNT, dtype=np.float32), "w")
    model = _model(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Mul", ["p", "mask"], ["y"])], [weight]
    )
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    assert np.array_equal(OnnxSession(tmp_path / "m.onnx").run(_feeds())["y"], _feeds()["x"])


def _fp8_model() -> tuple[onnx.ModelProto, np.ndarray]:
    rng = np.random.default_rng(1)
    weight = rng.integers(-15, 16, (COUNT, FEATURES)).astype(ml_dtypes.float8_e4m3fn)
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    stored = helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, weight.shape, weight.tobytes(), raw=True)
    initializers = [zero, stored, *_scales(rng)]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["values"]),
        helper.make_node("DequantizeLinear", ["values", "one", "zero"], ["x_hat"]),
        *_product("x_hat"),
    ]
    x_hat = _feeds()["x"].astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return _model(nodes, initializers), x_hat @ (weight.astype(np.float64) * _row(initializers))


def _weight_only_model() -> tuple[onnx.ModelProto, np.ndarray]:
    rng = np.random.default_rng(1)
    weight = rng.integers(-120, 121, (COUNT, FEATURES)).astype(np.int8)
    initializers = [numpy_helper.from_array(weight, "w"), *_scales(rng)]
    return _model(_product("x"), initializers), _feeds()["x"] @ (weight.astype(np.float64) * _row(initializers))


def _scales(rng: np.random.Generator) -> list[onnx.TensorProto]:
    row = rng.uniform(0.1, 1.0, FEATURES).astype(np.float32)
    return [numpy_helper.from_array(np.float32(1), "one"), numpy_helper.from_array(row, "row")]


def _row(initializers: list[onnx.TensorProto]) -> np.ndarray:
    return numpy_helper.to_array(initializers[-1]).astype(np.float64)


def _product(x: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("DequantizeLinear", ["w", "row"], ["w_hat"], axis=1),
        helper.make_node("MatMul", [x, "w_hat"], ["p"]),
        helper.make_node("Mul", ["p", "mask"], ["y"]),
    ]


@pytest.mark.parametrize("make", [_fp8_model, _weight_only_model], ids=["fp8", "weight-only"])
def test_quantized_graphs_keep_their_own_arithmetic(make: object) -> None:
    assert callable(make)
    model, expected = make()
    y = OnnxSession(model).run(_feeds())["y"]
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


def test_only_the_outputs_asked_for() -> None:
    assert OnnxSession(_double()).run(_feeds(), outputs=[]) == {}
    with pytest.raises(InputError, match="no output 'z'"):
        OnnxSession(_double()).run(_feeds(), outputs=["z"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "input 'x' is missing"),
        ({"masks": np.ones((3, 1), np.float32)}, "no input 'masks'; did you mean 'mask'"),
        ({"x": np.ones((3, COUNT), np.float64)}, "input 'x' must be float32, not float64"),
        ({"x": np.ones((3, COUNT + 1), np.float32)}, r"input 'x' must be \[batch, 64\], not \[3, 65\]"),
        ({"x": np.ones(COUNT, np.float32)}, r"input 'x' must be \[batch, 64\], not \[64\]"),
        ({"mask": np.ones((2, 1), np.float32)}, r"input 'mask' must be \[batch, 1\], not \[2, 1\]; batch is 3 here"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, np.ndarray | None], message: str) -> None:
    feeds = {name: array for name, array in {**_feeds(), **change}.items() if array is not None}
    with pytest.raises(InputError, match=message):
        OnnxSession(_double()).run(feeds)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    missing, text, empty, cut = (tmp_path / name for name in ("missing.onnx", "text.onnx", "empty.onnx", "cut.onnx"))
    text.write_text("this is not a protobuf")
    empty.touch()
    onnx.save(_double(), cut)
    cut.write_bytes(cut.read_bytes()[:60])
    for path in (missing, text, empty, cut, tmp_path):
        with pytest.raises(InputError, match=path.name):
            OnnxSession(path)


def test_missing_external_weights_are_named(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(COUNT, dtype=np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Mul", ["p", "mask"], ["y"])]
    onnx.save(
        _model(nodes, [weight]), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0
    )
    (tmp_path / "m.bin").unlink()
    with pytest.raises(InputError, match=r"m\.onnx.*m\.bin"):
        OnnxSession(tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"m\.onnx.*m\.bin"):
        read_model(tmp_path / "m.onnx")


def test_graph_that_the_runtime_does_not_know() -> None:
    model = _model([helper.make_node("Nothing", ["x"], ["y"], domain="nowhere")], [])
    model.opset_import.add(domain="nowhere", version=1)
    with pytest.raises(InputError, match=r"ONNX Runtime cannot run it.*Nothing"):
        OnnxSession(model)
