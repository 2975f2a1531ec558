"""A .plan or .engine file in TensorRT or TensorRT-RTX, bound to torch's GPU memory.

Written against the Python interfaces of TensorRT 10 and 11 and TensorRT-RTX 1.7. No engine has run on a GPU yet: the
binding is tested with a stand-in for TensorRT that reads and writes the bound addresses.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.device.rtx_file import check_rtx_engine, read_rtx_header
from exporter.errors import EnvironmentLacksError, InputError
from exporter.runtime.engine import Buffers, Engine, Shapes, current_device
from exporter.runtime.signature import TensorSpec

BATCH = "batch"
"""What an engine's dynamic dimensions are called: `exporter.device` leaves no other dynamic."""

_TORCH_TYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "FLOAT": torch.float32,
        "HALF": torch.float16,
        "BF16": torch.bfloat16,
        "INT64": torch.int64,
        "INT32": torch.int32,
        "INT8": torch.int8,
        "UINT8": torch.uint8,
        "BOOL": torch.bool,
    }
)


class TensorRtEngine(Engine):
    """An engine with one optimization profile and one output."""

    def __init__(self, path: Path, trt: Any, device: torch.device, *, cuda_graphs: bool = True) -> None:
        """Deserialize the file with `trt`, the module tensorrt or tensorrt_rtx.

        With `cuda_graphs` every shape is captured once and then replayed; TensorRT-RTX does it itself. Raises
        `InputError` for a file that this TensorRT cannot load.
        """
        self._trt = trt
        self._cuda_graphs = cuda_graphs
        # Kept: the engine is of no use after its logger or runtime is gone.
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        with current_device(device):
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise InputError(
                f"{path}: {trt.__name__} {trt.__version__} cannot load it: it was built by another version or for "
                "another GPU; build it again from its graph"
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if len(outputs) != 1:
            raise InputError(f"{path}: has {len(outputs)} outputs; a transformer has one, the noise prediction")
        self._types = {name: self._type(path, name) for name in names}
        self._smallest, self._largest = self._profile(inputs)
        super().__init__(str(path), tuple(self._spec(name) for name in inputs), self._spec(outputs[0]), device)

    @property
    def smallest_batch(self) -> int:
        """The profile's minimum; 1 when nothing is dynamic and the signature says the batch."""
        return self._smallest or 1

    @property
    def largest_batch(self) -> int | None:
        """The profile's maximum; None when nothing is dynamic and the signature says the batch."""
        return self._largest

    def _type(self, path: Path, name: str) -> torch.dtype:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _TORCH_TYPES:
            raise InputError(f"{path}: tensor {name!r} is {kind}, which PyTorch cannot hold")
        return _TORCH_TYPES[kind]

    def _spec(self, name: str) -> TensorSpec:
        kind = self._types[name]
        dtype = None if kind == torch.bfloat16 else np.dtype(torch.empty(0, dtype=kind).numpy().dtype)
        shape = tuple(BATCH if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
        return TensorSpec(name, dtype, shape)

    def _profile(self, inputs: list[str]) -> tuple[int | None, int | None]:
        """The smallest and the largest batch of the engine's profile, (None, None) if nothing is dynamic."""
        for name in inputs:
            for axis, size in enumerate(self._engine.get_tensor_shape(name)):
                if size < 0:
                    least, _, most = self._engine.get_tensor_profile_shape(name, 0)
                    return int(least[axis]), int(most[axis])
        return None, None

    def _check_batch(self, output: tuple[int, ...]) -> None:
        """Raise `InputError` for a batch that the profile does not have."""
        if self._smallest is None or self._largest is None:
            return
        batch = next(size for size, wanted in zip(output, self.output.shape, strict=True) if wanted == BATCH)
        if not self._smallest <= batch <= self._largest:
            raise InputError(
                f"{self.name}: a batch of {batch}, but the engine takes {self._smallest} to {self._largest} "
                "(guidance doubles the images of a batch)"
            )

    def _bind(self, inputs: Shapes, output: tuple[int, ...]) -> Buffers:
        self._check_batch(output)
        context = self._context()
        buffers = {spec.name: self._buffer(spec.name, inputs[spec.name]) for spec in self.inputs}
        result = self._buffer(self.output.name, output)
        for name, buffer in buffers.items():
            context.set_input_shape(name, tuple(buffer.shape))
        for name, buffer in (*buffers.items(), (self.output.name, result)):
            context.set_tensor_address(name, buffer.data_ptr())

        def execute() -> None:
            on_gpu = self.device.type == "cuda"
            stream = torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0
            if not context.execute_async_v3(stream):
                raise InputError(f"{self.name}: TensorRT could not run a batch of shape {list(output)}")

        if not self._cuda_graphs or self._captures_itself:
            return Buffers(buffers, result, execute)
        return _captured(Buffers(buffers, result, execute), self.device)

    @property
    def _captures_itself(self) -> bool:
        return hasattr(self._trt, "CudaGraphStrategy")

    def _context(self) -> Any:
        """A context of its own for every shape: a captured graph holds only as long as its context's shapes do."""
        if not (self._cuda_graphs and self._captures_itself):
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=self._types[name], device=self.device)


def _captured(eager: Buffers, device: torch.device) -> Buffers:
    """The same computation, replayed from a CUDA graph."""
    # TensorRT allocates on its first run, which a capture does not allow.
    eager.launch()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        eager.launch()
    return Buffers(eager.inputs, eager.output, graph.replay)


def open_tensorrt(path: Path, device: torch.device) -> TensorRtEngine:
    """Load an engine with the TensorRT that built it.

    Raises `EnvironmentLacksError` without a GPU or without that TensorRT, `InputError` for a damaged file.
    """
    rtx = read_rtx_header(path) is not None
    if rtx:
        check_rtx_engine(path)
    module, extra = ("tensorrt_rtx", "rtx") if rtx else ("tensorrt", "tensorrt")
    if device.type != "cuda" or not torch.cuda.is_available():
        raise EnvironmentLacksError(
            f"{path}: a TensorRT engine runs on an NVIDIA GPU, and PyTorch finds none here; "
            "export the same recipe to .onnx to run it on the CPU"
        )
    try:
        trt = importlib.import_module(module)
    except ImportError as error:
        raise EnvironmentLacksError(f"{path}: needs {module}: {error}; pip install 'fp4export[{extra}]'") from error
    return TensorRtEngine(path, trt, device)
