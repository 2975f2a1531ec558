"""Operators on torch tensors, by compiled kernels through the CUDA driver, on torch's own stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from types import MappingProxyType

import torch
from onnx import TensorProto
from torch import Tensor

from exporter.cuda.kernel_cache import cache_folder, obtain_tactics
from exporter.errors import EnvironmentLacksError
from plugins.kernels.compile_worker import POINTER_ALIGNMENT
from plugins.kernels.driver import Driver, DriverError, DriverMissingError, LoadedKernel
from plugins.kernels.hardware import Capability
from plugins.kernels.library import LibraryKernel
from plugins.tensorrt_plugins.variant import PluginVariant

TORCH_TYPES: Mapping[int, torch.dtype] = MappingProxyType(
    {
        TensorProto.FLOAT: torch.float32,
        TensorProto.FLOAT16: torch.float16,
        TensorProto.BFLOAT16: torch.bfloat16,
        TensorProto.INT8: torch.int8,
        TensorProto.INT32: torch.int32,
        TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    }
)
"""Element types of tensors by ONNX's."""

Obtain = Callable[[PluginVariant, Capability], tuple[LibraryKernel, ...]]


def default_tactic(kernels: Sequence[LibraryKernel], rows: int) -> int:
    """The tactic for so many tokens: the smallest tile that holds them all, the first tactic where none does.

    Among tiles of equally many tokens the one of most programs, which keeps a GPU busy with few tokens.
    """
    holding = [index for index, kernel in enumerate(kernels) if kernel.launch.rows_per_program >= rows]

    def size(index: int) -> tuple[int, int]:
        return kernels[index].launch.rows_per_program, -kernels[index].launch.columns

    return min(holding, key=size, default=0)


class Launcher:
    """Operators of one GPU. `obtain` gives an operator's kernels; each is loaded once."""

    def __init__(self, driver: Driver, obtain: Obtain) -> None:
        self._driver, self._obtain = driver, obtain
        self._tactics: dict[str, tuple[LibraryKernel, ...]] = {}
        self._loaded: dict[str, LoadedKernel] = {}

    @property
    def capability(self) -> Capability:
        """The GPU's compute capability."""
        return self._driver.capability

    def tactics(self, variant: PluginVariant) -> tuple[LibraryKernel, ...]:
        """The operator's kernels for this GPU. Raises `EnvironmentLacksError` where they cannot be compiled."""
        if variant.op_type not in self._tactics:
            self._tactics[variant.op_type] = self._obtain(variant, self.capability)
        return self._tactics[variant.op_type]

    def allocate(self, variant: PluginVariant, first: Tensor) -> tuple[Tensor, ...]:
        """Tensors for the operator's outputs, beside its first input."""
        return tuple(
            torch.empty((*first.shape[:-1], width), dtype=TORCH_TYPES[element], device=first.device)
            for element, width in zip(variant.output_types.values(), variant.output_widths, strict=True)
        )

    def launch(
        self, variant: PluginVariant, tactic: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor], stream: int
    ) -> None:
        """Put one tactic on a stream. Raises `ValueError` for tensors that are not what the operator takes.

        The grid depends on the number of tokens; without tokens nothing is launched.
        """
        for name, element, tensor in zip(variant.input_names, variant.input_types.values(), inputs, strict=True):
            if tensor.dtype != TORCH_TYPES[element] or not tensor.is_contiguous():
                raise ValueError(f"{variant.op_type}: {name} must be contiguous {TORCH_TYPES[element]}")
            if tensor.data_ptr() % POINTER_ALIGNMENT:
                raise ValueError(f"{variant.op_type}: {name} must lie at a multiple of {POINTER_ALIGNMENT} bytes")
        rows = prod(inputs[0].shape[:-1])
        if rows == 0:
            return
        last = prod(inputs[-1].shape[:-1])
        scalars = {"rows": rows, "rows_per_sample": -(-rows // max(last, 1))}
        addresses = ([tensor.data_ptr() for tensor in tensors] for tensors in (inputs, outputs))
        self._load(self.tactics(variant)[tactic]).launch(next(addresses), scalars, next(addresses), stream)

    def run(self, variant: PluginVariant, inputs: Sequence[Tensor], stream: int) -> tuple[Tensor, ...]:
        """The operator's outputs by its default tactic. Raises as `launch` and `tactics`."""
        outputs = self.allocate(variant, inputs[0])
        tactic = default_tactic(self.tactics(variant), prod(inputs[0].shape[:-1]))
        self.launch(variant, tactic, inputs, outputs, stream)
        return outputs

    def _load(self, kernel: LibraryKernel) -> LoadedKernel:
        if kernel.entry not in self._loaded:
            try:
                self._loaded[kernel.entry] = self._driver.load(kernel)
            except DriverError as error:
                raise EnvironmentLacksError(f"this GPU's driver does not load a kernel: {error}") from error
        return self._loaded[kernel.entry]


@cache
def launcher_of(index: int) -> Launcher:
    """The launcher of GPU `index`, as torch counts them, for the rest of the process.

    Raises `EnvironmentLacksError` without a CUDA driver or such a GPU.
    """
    try:
        with torch.cuda.device(index):
            driver = Driver(index)
    except DriverMissingError as error:
        raise EnvironmentLacksError(str(error)) from error
    folder = cache_folder()
    return Launcher(driver, lambda variant, capability: obtain_tactics(variant, capability, folder))


def run_on_gpu(variant: PluginVariant, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The operator's outputs, computed on the inputs' GPU, in order with torch's own work on the current stream."""
    device = inputs[0].device
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        index = torch.cuda.current_device() if device.index is None else device.index
        return launcher_of(index).run(variant, inputs, stream)
