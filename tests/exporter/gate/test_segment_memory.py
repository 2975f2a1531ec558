"""A graph in segments takes the memory of one of them, not of all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

BLOCKS, WIDTH = 8, 2048
FP32_BYTES = 4 * BLOCKS * WIDTH * WIDTH
# Beyond what is resident before the graph is opened: the file, its weights in 8 bits and one segment's expansion.
MOST = 1.4 * FP32_BYTES

CHILD = """
import sys
from pathlib import Path
import numpy as np
from exporter.gate.segments import SegmentedSession
from exporter.onnx_files import read_model
from exporter.runtime import OnnxSession

def used(what):
    return 1024 * int(Path("/proc/self/status").read_text().partition(what + ":")[2].split()[0])

path, kind = sys.argv[1:]
before = used("VmRSS")
blocks = [f"blocks_{index}" for index in range(8)]
session = SegmentedSession(read_model(Path(path)), blocks) if kind == "segments" else OnnxSession(path)
session.run({"x": np.ones((1, 2048), np.float32)})
print(used("VmHWM") - before)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a process's peak is read from Linux's /proc")


Block = Callable[[str, str], tuple[onnx.TensorProto, list[onnx.NodeProto]]]


def expanded(block: str, hidden: str) -> tuple[onnx.TensorProto, list[onnx.NodeProto]]:
    """A product whose 4-bit weights are expanded as the lowering for a CPU expands them."""
    packed = np.random.default_rng(0).integers(0, 256, WIDTH * WIDTH // 2, dtype=np.uint8).tobytes()
    return helper.make_tensor(f"{block}.u4", TensorProto.UINT4, (WIDTH, WIDTH), packed, raw=True), [
        helper.make_node("Cast", [f"{block}.u4"], [f"{block}.codes"], to=TensorProto.INT32),
        helper.make_node("GatherElements", ["table", f"{block}.codes"], [f"{block}.weight"], axis=0),
        helper.make_node("Cast", [hidden], [f"{block}.input"], to=TensorProto.UINT8),
        helper.make_node("MatMulInteger", [f"{block}.input", f"{block}.weight"], [f"{block}.sums"]),
        helper.make_node("Cast", [f"{block}.sums"], [f"{block}.output"], to=TensorProto.FLOAT),
    ]


def decoded(block: str, hidden: str) -> tuple[onnx.TensorProto, list[onnx.NodeProto]]:
    """A product whose weights stay in their container until it runs, as the lowering for a GPU leaves them."""
    weight = np.random.default_rng(0).integers(-128, 128, (WIDTH, WIDTH), dtype=np.int8)
    return numpy_helper.from_array(weight, f"{block}.int8"), [
        helper.make_node("DequantizeLinear", [f"{block}.int8", "scale"], [f"{block}.weight"]),
        helper.make_node("MatMul", [hidden, f"{block}.weight"], [f"{block}.output"]),
    ]


def chain(path: Path, block: Block) -> Path:
    """The file of BLOCKS such products, one behind the other."""
    table = np.repeat(np.arange(-8, 8, dtype=np.int8)[:, None], WIDTH, axis=1)
    tensors = [numpy_helper.from_array(table, "table")]
    tensors.append(numpy_helper.from_array(np.float32(0.01), "scale"))
    nodes, hidden = [], "x"
    for index in range(BLOCKS):
        tensor, inside = block(f"blocks_{index}", hidden)
        tensors.append(tensor)
        nodes += inside
        hidden = inside[-1].output[0]
    nodes.append(helper.make_node("Neg", [hidden], ["sample"]))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "sample")]
    body = helper.make_graph(nodes, "chain", value[:1], value[1:], tensors)
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain(tmp_path_factory.mktemp("chain") / "chain.onnx", expanded)


def _peak(graph: Path, kind: str) -> int:
    command = [sys.executable, "-c", CHILD, str(graph), kind]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_whole_it_needs_several_times_its_weights(graph: Path) -> None:
    assert _peak(graph, "whole") > MOST


def test_constants_of_one_segment_at_a_time_are_expanded(graph: Path) -> None:
    assert _peak(graph, "segments") < MOST


def test_no_segment_keeps_what_it_decoded(tmp_path: Path) -> None:
    assert _peak(chain(tmp_path / "chain.onnx", decoded), "segments") < MOST
