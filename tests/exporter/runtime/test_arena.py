"""Sessions that share the arena take what others have given back, and renewing it gives that to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import resource
from pathlib import Path
import numpy as np
from onnx import TensorProto, helper
from exporter.runtime import OnnxSession
from exporter.runtime.arena import renew_arena

value = helper.make_tensor_value_info
nodes = [helper.make_node("Exp", [f"x{index}"], [f"x{index + 1}"]) for index in range(3)]
graph = helper.make_graph(nodes, "g", [value("x0", TensorProto.FLOAT, ["n"])], [value("x3", TensorProto.FLOAT, ["n"])])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
x = np.zeros(5_000_000, np.float32)

def pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def run():
    before = faults()
    OnnxSession(model, 1, shares_arena=True).run({"x0": x})
    return faults() - before

first, again, used = run(), run(), pages()
renew_arena()
print(first, again, used - pages(), resource.getpagesize())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is read from Linux's /proc")
def test_memory_is_taken_over_and_given_back() -> None:
    child = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True)
    first, again, given_back, page = map(int, child.stdout.split())
    one_tensor = 4 * 5_000_000 // page
    assert first > one_tensor
    # Its output is numpy's, and new each time.
    assert again < first - one_tensor
    assert given_back > one_tensor
