"""An exported transformer ready to run on torch tensors, in buffers that are made once per shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.runtime.signature import TensorSpec, check_shapes

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Buffers:
    """The memory that one shape of a batch is computed in: `launch` computes `output` from `inputs`."""

    inputs: Mapping[str, Tensor]
    output: Tensor
    launch: Callable[[], None]

    def run(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute on `tensors`, converted to the buffers' types and device."""
        for name, buffer in self.inputs.items():
            buffer.copy_(tensors[name])
        self.launch()
        # The next run writes into the same buffer, and a multistep scheduler may keep this one's result.
        return self.output.clone()


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside, a GPU is CUDA's current one: TensorRT loads, allocates and captures there and nowhere else."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Engine(ABC):
    """A graph or an engine with one output. `batch` is the name of its dynamic dimension in all signatures."""

    def __init__(self, name: str, inputs: tuple[TensorSpec, ...], output: TensorSpec, device: torch.device) -> None:
        """Remember the signature; `name` begins messages."""
        self.name = name
        self.inputs = inputs
        self.output = output
        self.device = device
        self._bound: dict[tuple[tuple[int, ...], ...], Buffers] = {}

    @property
    def smallest_batch(self) -> int:
        """The smallest batch that it takes."""
        return 1

    @property
    @abstractmethod
    def largest_batch(self) -> int | None:
        """The largest batch that it takes, None without a limit."""

    @abstractmethod
    def _bind(self, inputs: Shapes, output: tuple[int, ...]) -> Buffers:
        """Allocate and bind buffers of these shapes. Raises `InputError` for a batch that it does not take."""

    def run(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The output for `tensors` (name → tensor of any type and device), a new tensor on `device`.

        Raises `InputError` for a missing, unknown or misshapen input, and for a batch outside the engine's profile.
        """
        sizes = check_shapes(self.name, self.inputs, {name: tensor.shape for name, tensor in tensors.items()})
        shapes = {spec.name: tuple(tensors[spec.name].shape) for spec in self.inputs}
        key = tuple(shapes.values())
        with current_device(self.device):
            if key not in self._bound:
                self._bound[key] = self._bind(shapes, self._output_shape(sizes))
            return self._bound[key].run(tensors)

    def _output_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        unknown = [size for size in self.output.shape if isinstance(size, str) and size not in sizes]
        if unknown:
            raise InputError(f"{self.name}: the size {unknown[0]!r} of output {self.output.name!r} is no input's size")
        return tuple(size if isinstance(size, int) else sizes[size] for size in self.output.shape)
