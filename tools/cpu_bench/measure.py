"""Times side by side, memory of one graph alone, deviation from FP32, and where the time goes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from exporter.progress import Progress
from exporter.runtime import OnnxSession

THREADS = 2
ATTENTION = "attention"
Feeds = Mapping[str, npt.NDArray[Any]]

_KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "integer GEMM": ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
        ATTENTION: ("MultiHeadAttention", "FusedMatMul", "Softmax"),
        "FP32 GEMM": ("MatMul", "Gemm", "Conv"),
        "quantizers": ("QuantizeLinear", "DynamicQuantizeLinear", "ReduceMax", "ReduceMin", "Abs", "Max", "Div", "Sub"),
        "scales, biases, residuals": ("Mul", "Add"),
        "GELU": ("FastGelu", "Gelu", "QuickGelu", "BiasGelu"),
        "LayerNormalization": ("LayerNormalization", "SkipLayerNormalization"),
        "transposes and copies": ("Transpose", "Concat", "Split", "Reshape", "Slice", "Gather"),
    }
)


@dataclass(frozen=True)
class Memory:
    """Bytes of a process of its own that holds the graph and nothing else, beyond what it had before loading."""

    loaded: int
    running: int
    peak: int
    load_seconds: float


def inputs_of(session: OnnxSession, batch: int = 2) -> Feeds:
    """Seeded noise, one timestep, no caption token masked."""
    rng = np.random.default_rng(0)
    feeds: dict[str, npt.NDArray[Any]] = {}
    for spec in session.inputs:
        shape = [size if isinstance(size, int) else batch for size in spec.shape]
        feeds[spec.name] = rng.standard_normal(shape).astype(np.float32)
        if spec.name == "timestep":
            feeds[spec.name] = np.full(shape, 500, np.float32)
        elif spec.name == "encoder_attention_mask":
            feeds[spec.name] = np.ones(shape, np.float32)
    return feeds


def side_by_side(
    paths: Mapping[str, Path], rounds: int, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, npt.NDArray[Any]]]:
    """Seconds of every round and the output, per graph; each round runs every graph once, after one to warm up."""
    sessions = {name: OnnxSession(path, THREADS) for name, path in paths.items()}
    feeds = inputs_of(next(iter(sessions.values())))
    outputs = {name: session.run(feeds)["sample"] for name, session in sessions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    with progress.task("rounds", rounds * len(paths)) as task:
        for _ in range(rounds):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(feeds)
                seconds[name].append(time.perf_counter() - start)
                task.advance()
    return seconds, outputs


def snr_db(reference: npt.NDArray[Any], values: npt.NDArray[Any], channels: int = 4) -> float:
    """Noise prediction (the first `channels` channels) against the reference, in decibels."""
    signal = reference[:, :channels].astype(np.float64)
    noise = values[:, :channels].astype(np.float64) - signal
    return float(10 * np.log10(np.square(signal).sum() / np.square(noise).sum()))


def memory_of(path: Path) -> Memory:
    """Load and run the graph in a fresh process and ask the kernel what that took."""
    answer = subprocess.run(
        [sys.executable, "-m", "tools.cpu_bench.measure", str(path)], capture_output=True, text=True, check=True
    )
    return Memory(**json.loads(answer.stdout))


def profile(path: Path, folder: Path, runs: int = 4) -> dict[str, float]:
    """Kind of operator → seconds in one run, each node at its fastest of `runs` runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = inputs_of(OnnxSession(path, THREADS))
    for _ in range(runs):
        session.run(None, feeds)
    trace = Path(session.end_profiling())
    events = json.loads(trace.read_text(encoding="utf-8"))
    trace.unlink()
    return _by_kind(events, runs)


def _by_kind(events: list[dict[str, Any]], runs: int) -> dict[str, float]:
    kernels: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time") and event["args"]["op_name"] != "Scan":
            kernels[event["name"], event["args"]["op_name"]].append(event["dur"] / 1e6)
    kind_of = {operator: kind for kind, operators in _KINDS.items() for operator in operators}
    totals: dict[str, float] = defaultdict(float)
    for (_, operator), seconds in kernels.items():
        # Nodes within tiles run several times a run: their fastest run times how often they did.
        totals[kind_of.get(operator, "the rest")] += min(seconds) * len(seconds) / runs
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def gemm_seconds(shapes: Mapping[tuple[int, int, int], int], runs: int = 7) -> float:
    """The integer products of these shapes (M, K, N) → how often, alone, each at the fastest of `runs` runs."""
    return sum(count * _product_seconds(*shape, runs) for shape, count in shapes.items())


def _product_seconds(m: int, k: int, n: int, runs: int) -> float:
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.integers(-120, 121, (k, n)).astype(np.int8), "w")
    zero = numpy_helper.from_array(np.uint8(60), "zero")
    node = helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [m, k])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [m, n])
    graph = helper.make_graph([node], "product", [x], [y], [weight, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = OnnxSession(model, THREADS)
    feeds = {"x": rng.integers(0, 121, (m, k)).astype(np.uint8)}
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        session.run(feeds)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def product_shapes(path: Path, tokens: int, caption_tokens: int) -> Counter[tuple[int, int, int]]:
    """(M, K, N) of the file's quantized layers, by its own table of layers."""
    from exporter.passes.layer_table import read_layer_table

    shapes: Counter[tuple[int, int, int]] = Counter()
    for entry in read_layer_table(onnx.load(path, load_external_data=False)):
        of_caption = ".attn2.to_k" in entry.layer or ".attn2.to_v" in entry.layer
        shapes[caption_tokens if of_caption else tokens, entry.in_features, entry.out_features] += 1
    return shapes


def middle(seconds: Sequence[float]) -> float:
    """Their median."""
    return float(median(seconds))


def _resident() -> dict[str, int]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def _measure_memory(path: Path) -> Memory:
    before = _resident()["VmRSS"]
    start = time.perf_counter()
    session = OnnxSession(path, THREADS)
    load_seconds = time.perf_counter() - start
    loaded = _resident()["VmRSS"]
    session.run(inputs_of(session))
    after = _resident()
    return Memory(loaded - before, after["VmRSS"] - before, after["VmHWM"] - before, load_seconds)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure_memory(Path(sys.argv[1])))))
