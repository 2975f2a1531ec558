"""A graph in segments takes the memory of one of them, not of all."""

from __future__ import annotations

import subprocess
import sys
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


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of one product each, whose 4-bit weights are expanded as the lowering for a CPU expands them."""
    generator = np.random.default_rng(0)
    tensors = [numpy_helper.from_array(np.arange(-8, 8, dtype=np.int8), "table")]
    nodes, hidden = [], "x"
    for index in range(BLOCKS):
        name = f"blocks_{index}"
        packed = generator.integers(0, 256, WIDTH * WIDTH // 2, dtype=np.uint8).tobytes()
        tensors.append(helper.make_tensor(f"{name}.u4", TensorProto.UINT4, (WIDTH, WIDTH), packed, raw=True))
        output = f"{name}.output"
        nodes += [
            helper.make_node("Cast", [f"{name}.u4"], [f"{name}.codes"], to=TensorProto.INT32),
            helper.make_node("Gather", ["table", f"{name}.codes"], [f"{name}.weight"], axis=0),
            helper.make_node("Cast", [hidden], [f"{name}.input"], to=TensorProto.UINT8),
            helper.make_node("MatMulInteger", [f"{name}.input", f"{name}.weight"], [f"{name}.sums"]),
            helper.make_node("Cast", [f"{name}.sums"], [output], to=TensorProto.FLOAT),
        ]
        hidden = output
    nodes.append(helper.make_node("Neg", [hidden], ["sample"]))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "sample")]
    body = helper.make_graph(nodes, "chain", value[:1], value[1:], tensors)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path_factory.mktemp("chain") / "chain.onnx"
    onnx.save(model, path)
    return path


def _peak(graph: Path, kind: str) -> int:
    command = [sys.executable, "-c", CHILD, str(graph), kind]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_whole_it_needs_several_times_its_weights(graph: Path) -> None:
    assert _peak(graph, "whole") > MOST


def test_constants_of_one_segment_at_a_time_are_expanded(graph: Path) -> None:
    assert _peak(graph, "segments") < MOST
