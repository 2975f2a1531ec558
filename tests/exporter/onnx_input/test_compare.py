"""The gate of an ONNX model fails where something is wrong, and names the layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from exporter.errors import FidelityError, InputError
from exporter.gate.table import GateResult
from exporter.onnx_files import save_onnx
from exporter.onnx_input.compare import Graphs, check_reading, compare_graphs, compare_rewritten, outputs_snr_db
from exporter.onnx_input.foreign import ForeignModel
from exporter.onnx_input.model import read_source
from exporter.onnx_input.random_inputs import random_inputs
from exporter.onnx_input.selection import FormatOptions
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.progress import NullProgress
from exporter.quantize import QuantLinear
from exporter.targets import TARGETS, Target
from exporter.validate import conclude
from tests.exporter.onnx_input.models import WIDTH, HandMade, save

CPU = TARGETS["cpu"]


@dataclass(frozen=True)
class Prepared:
    """Two layers in a row, quantized, exported and lowered."""

    loaded: ForeignModel
    modules: dict[str, QuantLinear]
    graphs: Graphs
    folder: Path

    def compare(self) -> tuple[GateResult, float]:
        feeds = random_inputs(self.loaded.model, "model.onnx")
        run = self.loaded.probed(feeds, self.folder)
        return compare_graphs(self.modules, run.layers, self.graphs, run.outputs, feeds, self.folder, CPU)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    made = HandMade()
    hidden = made.node("MatMul", "x", made.random("first.weight", WIDTH, WIDTH), output="h")
    y = made.node("MatMul", hidden, made.random("second.weight", WIDTH, WIDTH), output="y")
    path = save(made.model(y), tmp_path / "model.onnx")
    loaded = ForeignModel.of(path, read_source(path), FormatOptions("e2m1", group=32), CPU)
    modules = loaded.modules(NullProgress())
    exported, _ = run_passes(loaded.model, loaded.waist_passes(modules), CPU)
    lowered, _ = run_passes(exported, lowering_passes(CPU), CPU)
    graphs = Graphs(tmp_path / "exported.onnx", tmp_path / "lowered.onnx")
    save_onnx(exported, graphs.exported)
    save_onnx(lowered, graphs.lowered)
    return Prepared(loaded, modules, graphs, tmp_path)


def test_right_graphs_pass(prepared: Prepared) -> None:
    result, quantization_db = prepared.compare()
    assert result.passed
    assert 10 < quantization_db < 40
    assert [(row.kind, row.name) for row in result.rows[-3:]] == [
        ("linear", "first"),
        ("linear", "second"),
        ("end_to_end", "y"),
    ]


def test_a_wrong_scale_is_named(prepared: Prepared) -> None:
    prepared.modules["second"].scales[3] *= 1.001
    result, _ = prepared.compare()
    assert not result.passed
    with pytest.raises(FidelityError, match=r"linear second \(exported graph\): .*output channel 3"):
        conclude(result, prepared.folder, NullProgress())


def test_a_lowered_graph_of_other_weights_is_named(prepared: Prepared) -> None:
    other = dict(prepared.modules)
    other["first"] = prepared.modules["second"]
    swapped, _ = run_passes(prepared.loaded.model, prepared.loaded.waist_passes(other), CPU)
    lowered, _ = run_passes(swapped, lowering_passes(CPU), CPU)
    save_onnx(lowered, prepared.graphs.lowered)
    result, _ = prepared.compare()
    failure = result.first_failure
    assert failure is not None
    assert (failure.stage, failure.name) == ("lowered", "first")


def test_a_misread_layer_is_named(prepared: Prepared) -> None:
    feeds = random_inputs(prepared.loaded.model, "model.onnx")
    probed = prepared.loaded.probed(feeds, prepared.folder).layers["first"]
    linear = prepared.loaded.linears["first"]
    check_reading(linear, probed)
    with pytest.raises(FidelityError, match=r"first: was read as a linear layer.*keep it with --keep 'first'"):
        check_reading(replace(linear, transposes_weight=False), probed)


def _scale_last_product(graph: gs.Graph, target: Target) -> int:
    """A rewrite that is wrong by one part in a hundred: y → 1.01·y."""
    (y,) = graph.outputs
    product = gs.Variable("product", y.dtype, y.shape)
    y.inputs[0].outputs = [product]
    factor = gs.Constant("factor", np.full(1, 1.01, np.float32))
    graph.nodes.append(gs.Node("Mul", "mul", {}, [product, factor], [y]))
    return 1


def test_a_wrong_rewrite_is_found_before_anything_is_quantized(prepared: Prepared) -> None:
    feeds = random_inputs(prepared.loaded.model, "model.onnx")
    original = prepared.loaded.probed(feeds, prepared.folder).outputs
    rows = [
        compare_rewritten(prepared.loaded.model, passes, original, feeds, prepared.folder, CPU)
        for passes in (WAIST_PASSES, (*WAIST_PASSES, _scale_last_product))
    ]
    assert [row.passed for row in rows] == [True, False]
    message = r"end to end not quantized .*the passes alone change the outputs: SNR 40\.0 dB, at least \d+"
    with pytest.raises(FidelityError, match=message):
        conclude(GateResult((rows[1],)), prepared.folder, NullProgress())


def test_the_snr_of_several_outputs_is_the_worst_one_s() -> None:
    one = np.ones(4, np.float32)
    found = outputs_snr_db({"a": one, "b": one}, {"a": one, "b": one * np.float32(0.9)})
    assert found == pytest.approx(20, abs=1e-3)


def test_outputs_that_are_no_floats_are_left_out() -> None:
    one, ids = np.ones(4, np.float32), np.arange(4)
    assert outputs_snr_db({"a": one, "ids": ids}, {"a": one * np.float32(0.9), "ids": ids + 1}) == pytest.approx(20)
    with pytest.raises(InputError, match=r"outputs are ids \(int64\): none is floating point.*--no-validate"):
        outputs_snr_db({"ids": ids}, {"ids": ids})
