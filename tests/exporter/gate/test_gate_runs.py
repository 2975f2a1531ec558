"""Running and comparing through polygraphy, and its command line."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.errors import FidelityError
from exporter.gate.runs import compare_snr, repeat_command, run_graph, save_feeds, save_reference
from tests.exporter.gate.hand_made import Example

A = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_snr_is_the_worst_over_iterations() -> None:
    close, far = {"y": A * np.float32(1.0001)}, {"y": A * np.float32(1.01)}
    snr = compare_snr([{"y": A}, {"y": A}], [close, far])
    assert snr["y"] == pytest.approx(40, abs=0.1)
    assert compare_snr([{"y": A}], [{"y": A}]) == {"y": math.inf}


def test_nan_and_shapes_that_differ_never_pass() -> None:
    broken = A.copy()
    broken[1, 1] = np.nan
    assert math.isnan(compare_snr([{"y": A}, {"y": A}], [{"y": A}, {"y": broken}])["y"])
    assert math.isnan(compare_snr([{"y": A}], [{"y": A[:2]}])["y"])


def test_threads_that_are_silenced_find_polygraphy_imported(tmp_path: Path) -> None:
    """Its own imports fail now and then where two threads need different modules of it."""
    program = f"""
import sys
from pathlib import Path
import numpy as np
import onnx
from onnx import TensorProto, helper
from exporter.gate.runs import compare_snr, quiet, run_graph, save_feeds, save_reference
value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", value[:1], value[1:])
folder, feeds = Path({str(tmp_path)!r}), [{{"x": np.ones(2, np.float32)}}]
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "g.onnx")
quiet()
known = {{name for name in sys.modules if name.startswith("polygraphy")}}
save_feeds(feeds, folder / "feeds.json")
outputs = run_graph(folder / "g.onnx", feeds, optimized=True)
save_reference(outputs, folder / "outputs.json")
compare_snr(outputs, outputs)
print(*sorted({{name for name in sys.modules if name.startswith("polygraphy")}} - known))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


def test_rows_can_be_left_out() -> None:
    broken = A.copy()
    broken[1] = 99
    kept = {"y": np.array([True, False, True])}
    assert compare_snr([{"y": A}], [{"y": broken}], kept) == {"y": math.inf}


def test_a_graph_that_cannot_run_is_a_fidelity_error(example: Example, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    model = onnx.ModelProto()
    model.CopyFrom(example.model)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    with pytest.raises(FidelityError, match="NoSuchOperator"):
        run_graph(path, [{"x": np.zeros((1, 5, 64), np.float32)}], optimized=True)


@pytest.mark.slow
def test_the_printed_command_repeats_the_verdict(example: Example, tmp_path: Path) -> None:
    record = example.reference.models[0]
    graph, feeds, good, bad = (tmp_path / name for name in ("graph.onnx", "in.json", "good.json", "bad.json"))
    onnx.save(example.model, graph)
    save_feeds([{**record.inputs, "not an input": A}], feeds)
    save_reference([dict(record.boundaries)], good)
    save_reference([{"sample": record.boundaries["sample"] * np.float32(1.01)}], bad)
    for reference, limits, code in ((good, {}, 0), (bad, {}, 1), (bad, {"sample": 39.97}, 0)):
        command = repeat_command(graph, feeds, reference, limits, default_db=100.0, optimized=False)
        program, *arguments = shlex.split(command)
        assert program == "polygraphy"
        run = subprocess.run([Path(sys.executable).parent / program, *arguments], capture_output=True, text=True)
        assert run.returncode == code, run.stdout


def test_threads_find_polygraphy_imported() -> None:
    """Its modules are imported before the threads that use them begin: imported by two at once they fail at random."""
    lines = (
        "import sys",
        "from exporter.gate.runs import quiet",
        "quiet()",
        "before = set(sys.modules)",
        "from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx",
        "from polygraphy.comparator import Comparator, RunResults, SnrCompareFunc",
        "from polygraphy.json import Encoder, load_json",
        "print(sorted(set(sys.modules) - before))",
    )
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
