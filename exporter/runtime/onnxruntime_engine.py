"""An exported .onnx file in ONNX Runtime, its inputs and output bound to torch's memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from exporter.errors import EnvironmentLacksError, InputError
from exporter.runtime.engine import Buffers, Engine, Shapes
from exporter.runtime.onnx_session import CPU_PROVIDERS, ORT_ERRORS, Provider, create_session, first_line, spec_of
from exporter.runtime.signature import TensorSpec

_CUDA = "CUDAExecutionProvider"


class OnnxRuntimeEngine(Engine):
    """Runs on the CPU, or on a GPU where onnxruntime-gpu is installed."""

    def __init__(self, path: Path, device: torch.device, threads: int | None = None) -> None:
        """Load the file; `threads` limits the CPU threads of one operator.

        Raises `InputError` for a file that ONNX Runtime cannot run or that has not one output, and
        `EnvironmentLacksError` for a device that is not here.
        """
        if device.type == "cuda":
            _check_cuda(path)
            # Torch's "cuda" is whichever GPU is current, ONNX Runtime's is the first.
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._session = create_session(path, threads, providers_for(device))
        if device.type == "cuda" and _CUDA not in self._session.get_providers():
            raise EnvironmentLacksError(
                f"{path}: device cuda: ONNX Runtime's CUDA provider does not load, for the reason that it printed; "
                "install an onnxruntime-gpu for the CUDA version that PyTorch is built with, or use --device cpu"
            )
        outputs = [spec_of(value) for value in self._session.get_outputs()]
        if len(outputs) != 1:
            raise InputError(f"{path}: has {len(outputs)} outputs; a transformer has one, the noise prediction")
        inputs = tuple(spec_of(value) for value in self._session.get_inputs())
        super().__init__(str(path), inputs, outputs[0], device)

    @property
    def largest_batch(self) -> int | None:
        """None: a graph takes any batch that memory holds."""
        return None

    def _bind(self, inputs: Shapes, output: tuple[int, ...]) -> Buffers:
        binding = self._session.io_binding()
        buffers = {spec.name: self._buffer(spec, inputs[spec.name]) for spec in self.inputs}
        result = self._buffer(self.output, output)
        place = (self.device.type, self.device.index or 0)
        for spec in self.inputs:
            buffer = buffers[spec.name]
            binding.bind_input(spec.name, *place, spec.dtype, tuple(buffer.shape), buffer.data_ptr())
        binding.bind_output(self.output.name, *place, self.output.dtype, output, result.data_ptr())

        def launch() -> None:
            if self.device.type == "cuda":
                # ONNX Runtime computes on a stream of its own.
                torch.cuda.current_stream(self.device).synchronize()
            try:
                self._session.run_with_iobinding(binding)
            except ORT_ERRORS as error:
                raise InputError(f"{self.name}: ONNX Runtime failed: {first_line(error)}") from error
            binding.synchronize_outputs()

        return Buffers(buffers, result, launch)

    def _buffer(self, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
        if spec.dtype is None:
            raise InputError(f"{self.name}: tensor {spec.name!r} has a type that numpy and ONNX Runtime do not share")
        return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, spec.dtype)).dtype, device=self.device)


def providers_for(device: torch.device) -> tuple[Provider, ...]:
    """ONNX Runtime's providers that compute on `device`, and on the CPU what they cannot.

    FP32 products stay FP32: by default the CUDA provider rounds their operands to TF32.
    """
    if device.type == "cpu":
        return CPU_PROVIDERS
    return ((_CUDA, {"device_id": str(device.index or 0), "use_tf32": "0"}), *CPU_PROVIDERS)


def _check_cuda(path: Path) -> None:
    if not torch.cuda.is_available():
        raise EnvironmentLacksError(f"{path}: device cuda: PyTorch finds no GPU here; use --device cpu")
    if _CUDA not in ort.get_available_providers():
        raise EnvironmentLacksError(
            f"{path}: device cuda: this ONNX Runtime has no CUDA provider; pip install 'fp4export[gpu]'"
        )
