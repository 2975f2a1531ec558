"""Binding of TensorRT engines, with a stand-in for TensorRT that works on the bound addresses."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exporter.errors import InputError
from exporter.runtime.tensorrt_engine import TensorRtEngine

WIDTH = 5
SHAPES = {"x": (-1, WIDTH), "bias": (WIDTH,), "y": (-1, WIDTH)}


class _Context:
    """Computes y = 2 x + bias where the addresses point."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 0
        batch = self.shapes["x"][0]
        at = {name: ctypes.cast(address, ctypes.POINTER(ctypes.c_float)) for name, address in self.addresses.items()}
        for index in range(batch * WIDTH):
            at["y"][index] = 2 * at["x"][index] + at["bias"][index % WIDTH]
        return True


class _CopyOnGpu(_Context):
    """Copies x to y on the stream, by the CUDA driver."""

    def __init__(self) -> None:
        super().__init__()
        self.executed = 0

    def execute_async_v3(self, stream: int) -> bool:
        self.executed += 1
        size = ctypes.c_size_t(4 * self.shapes["x"][0] * WIDTH)
        to, source = (ctypes.c_uint64(self.addresses[name]) for name in ("y", "x"))
        return ctypes.CDLL("libcuda.so.1").cuMemcpyDtoDAsync_v2(to, source, size, ctypes.c_void_p(stream)) == 0


class _Engine:
    num_io_tensors = len(SHAPES)

    def __init__(self, kind: str, context: type[_Context] = _Context) -> None:
        self.kind = kind
        self.context = context
        self.made: list[_Context] = []
        self.contexts: list[tuple[Any, ...]] = []

    def get_tensor_name(self, index: int) -> str:
        return list(SHAPES)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "output" if name == "y" else "input"

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.kind)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return SHAPES[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        assert (name, profile) == ("x", 0)
        return (2, WIDTH), (4, WIDTH), (6, WIDTH)

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace(cuda_graph_strategy=None)

    def create_execution_context(self, *config: Any) -> _Context:
        self.contexts.append(config)
        self.made.append(self.context())
        return self.made[-1]


class _TensorRt:
    """The part of the module tensorrt that is used; `engine` is what a file deserializes to."""

    __name__ = "tensorrt"
    __version__ = "0"
    TensorIOMode = SimpleNamespace(INPUT="input")

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            assert level == self.ERROR

    def __init__(self, engine: _Engine | None) -> None:
        self.engine = engine

    def Runtime(self, logger: Any) -> SimpleNamespace:  # noqa: N802 - TensorRT's name
        return SimpleNamespace(deserialize_cuda_engine=lambda content: self.engine)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A file; the stand-in does not read it."""
    file = tmp_path / "e.plan"
    file.write_bytes(b"engine")
    return file


def _open(plan: Path, trt: _TensorRt, *, cuda_graphs: bool = False) -> TensorRtEngine:
    return TensorRtEngine(plan, trt, torch.device("cpu"), cuda_graphs=cuda_graphs)


def test_numbers_pass_through_the_bound_buffers(plan: Path) -> None:
    engine = _open(plan, _TensorRt(_Engine("FLOAT")))
    assert (engine.smallest_batch, engine.largest_batch) == (2, 6)
    assert [(spec.name, spec.shape) for spec in engine.inputs] == [("x", ("batch", WIDTH)), ("bias", (WIDTH,))]
    bias = torch.arange(WIDTH)
    for batch in (2, 6, 2):
        x = torch.randn(batch, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(engine.run({"x": x, "bias": bias}), 2 * x.float() + bias)
    assert len(engine._engine.contexts) == 2


@pytest.mark.parametrize("batch", [1, 7])
def test_batches_outside_the_profile(plan: Path, batch: int) -> None:
    engine = _open(plan, _TensorRt(_Engine("FLOAT")))
    with pytest.raises(InputError, match=f"a batch of {batch}, but the engine takes 2 to 6"):
        engine.run({"x": torch.zeros(batch, WIDTH), "bias": torch.zeros(WIDTH)})


def test_tensorrt_rtx_captures_its_graphs_itself(plan: Path) -> None:
    trt = _TensorRt(_Engine("FLOAT"))
    trt.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")  # type: ignore[attr-defined]
    engine = _open(plan, trt, cuda_graphs=True)
    engine.run({"x": torch.zeros(2, WIDTH), "bias": torch.zeros(WIDTH)})
    (config,) = engine._engine.contexts[0]
    assert config.cuda_graph_strategy == "whole"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none")
def test_every_shape_is_captured_once_and_replayed(plan: Path) -> None:
    made = _Engine("FLOAT", _CopyOnGpu)
    engine = TensorRtEngine(plan, _TensorRt(made), torch.device("cuda", 0), cuda_graphs=True)
    bias = torch.zeros(WIDTH, device="cuda")
    for batch in (2, 6, 2, 6, 2):
        x = torch.randn(batch, WIDTH, device="cuda")
        y = engine.run({"x": x * 2, "bias": bias})
        assert torch.equal(y, x * 2)
    assert [context.executed for context in made.made if isinstance(context, _CopyOnGpu)] == [2, 2]


def test_files_that_tensorrt_cannot_load(plan: Path) -> None:
    with pytest.raises(InputError, match="cannot load it: it was built by another version"):
        _open(plan, _TensorRt(None))
    with pytest.raises(InputError, match="tensor 'x' is FP4, which PyTorch cannot hold"):
        _open(plan, _TensorRt(_Engine("FP4")))


def test_the_interfaces_used_exist_in_tensorrt_rtx() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    used = {
        trt.ICudaEngine: (
            "create_execution_context",
            "create_runtime_config",
            "get_tensor_dtype",
            "get_tensor_mode",
            "get_tensor_name",
            "get_tensor_profile_shape",
            "get_tensor_shape",
            "num_io_tensors",
        ),
        trt.IExecutionContext: ("execute_async_v3", "set_input_shape", "set_tensor_address"),
        trt.IRuntimeConfig: ("cuda_graph_strategy",),
        trt.CudaGraphStrategy: ("WHOLE_GRAPH_CAPTURE",),
        trt.Runtime: ("deserialize_cuda_engine",),
    }
    assert [(kind, name) for kind, names in used.items() for name in names if not hasattr(kind, name)] == []
