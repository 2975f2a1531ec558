"""Where calibration computes: on the CPU, or on a GPU to which blocks of the model come one at a time.

Weights stay where they are, in main memory or in mapped files, and so do all samples' activations where the GPU has no
room for them; what a computation needs of them is on the GPU while it lasts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from exporter.calibration.activations import BatchLimit
from exporter.cores import on_every_core
from exporter.device.machine import emulates_bf16
from exporter.errors import EnvironmentLacksError, InputError
from exporter.shards import Shard

CPU = torch.device("cpu")

# Enough for a GPU to be busy; a feed-forward layer's inside of PixArt takes 0.6 GB.
_TOKENS_ON_GPU = 1 << 15
# A model of at most this share of the GPU's memory stays there as a whole while it runs.
_WHOLE_MODEL = 1 / 3
# Gram matrices are added up there until they take this share, the others in main memory.
_GRAMS = 1 / 4
# All samples' activations are there if they take at most this share of what the largest block leaves; the rest is for
# batches.
_ACTIVATIONS = 1 / 2
LEARNED_BLOCK = 12
"""What a block takes while it is learned, in sizes of its weights: these, what is learned of them with its gradient and
two moments, and what the rounding function keeps for its own gradient."""
# What cuBLAS needs to give the same bits again; read when its first product is made.
_CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_Tensors = dict[str, Tensor | None]
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Placement:
    """A device, and how many bytes of its memory may be used (0: no GPU)."""

    device: torch.device = CPU
    memory: int = 0

    @property
    def on_gpu(self) -> bool:
        """Whether it is not the CPU."""
        return self.device.type != CPU.type

    def limit(self) -> BatchLimit:
        """How many tokens go through a model at once, to begin with."""
        return BatchLimit(_TOKENS_ON_GPU) if self.on_gpu else BatchLimit()

    def keeps(self, activations: int, block: int) -> bool:
        """Whether so many bytes of all samples' activations stay on the GPU, where the largest block has `block`."""
        return self.on_gpu and activations <= (self.memory - LEARNED_BLOCK * block) * _ACTIVATIONS

    @property
    def room_for_grams(self) -> int:
        """How many bytes of Gram matrices stay on the GPU while they are added up."""
        return int(self.memory * _GRAMS)

    @property
    def multiplies_bf16(self) -> bool:
        """Whether the device multiplies BF16 itself, as far as is known."""
        return torch.cuda.is_bf16_supported(including_emulation=False) if self.on_gpu else not emulates_bf16()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Use no more than the memory, and compute in full float32 and repeatably, as far as PyTorch can.

        Raises `EnvironmentLacksError` where what has to be on the GPU at once, whatever the batch, does not fit.
        """
        if not self.on_gpu:
            yield
            return
        os.environ.setdefault(*_CUBLAS_WORKSPACE)
        total = torch.cuda.get_device_properties(self.device).total_memory
        repeatable = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        # A property of this module, which mypy does not see.
        deterministic: Any = torch.utils.deterministic
        filled = deterministic.fill_uninitialized_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.memory / total), self.device)
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Else every tensor for all samples' activations would be filled with NaN before it is filled.
        deterministic.fill_uninitialized_memory = False
        try:
            # Convolutions are the only products that PyTorch makes in TF32 unless told otherwise.
            exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
            with torch.cuda.device(self.device), exact:
                yield
        except torch.OutOfMemoryError as error:
            raise EnvironmentLacksError(
                f"calibration.device_memory: {self.memory / 1e9:.1f} GB of {self.device} do not suffice for a block of "
                f"the model with its roundings: {error}; give it more, or calibration.device=cpu"
            ) from error
        finally:
            deterministic.fill_uninitialized_memory = filled
            torch.use_deterministic_algorithms(repeatable[0], warn_only=repeatable[1])
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
            torch.cuda.empty_cache()

    @contextmanager
    def holds(self, *modules: nn.Module) -> Iterator[None]:
        """Let `modules` compute on the device; afterwards they have the tensors that they had before."""
        loan = _Loan((part for module in modules for part in module.modules()), self.device)
        try:
            loan.begin()
            yield
        finally:
            loan.end()

    @contextmanager
    def holds_model(self, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
        """Let `model` compute on the device: as a whole if it is small there, else each of its `blocks` comes when it
        is run and goes when it has."""
        if not self.on_gpu or module_bytes(model) <= self.memory * _WHOLE_MODEL:
            with self.holds(model):
                yield
            return
        inside = {part for _, block in blocks for part in block.modules()}
        with ExitStack() as stack:
            rest = _Loan((part for part in model.modules() if part not in inside), self.device)
            stack.callback(rest.end)
            rest.begin()
            for _, block in blocks:
                loan = _Loan(block.modules(), self.device)
                # Also when a block is interrupted.
                stack.callback(loan.end)
                stack.callback(block.register_forward_pre_hook(lambda *_, loan=loan: loan.begin(), prepend=True).remove)
                hook = block.register_forward_hook(lambda *_, loan=loan: loan.end(), always_call=True)
                stack.callback(hook.remove)
            yield

    def each(self, work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        """`work` on all items, in order: on a CPU one item per core at a time, on a GPU one after the other."""
        return map(work, items) if self.on_gpu else on_every_core(work, items)


@contextmanager
def repeatable_gradients() -> Iterator[None]:
    """Where results are to be repeatable, let gradients be so, too.

    Of attention PyTorch has repeatable gradients, but where it may only warn it computes the others. Raises
    `EnvironmentLacksError` where an operation has none on a GPU.
    """
    warns = torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    if warns:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if not warns or "deterministic" not in str(error):
            raise
        reason = str(error).partition(".")[0]
        raise EnvironmentLacksError(f"calibration.device: {reason}; calibration.device=cpu computes it") from error
    finally:
        if warns:
            torch.use_deterministic_algorithms(True, warn_only=True)


def choose_placement(wanted: str, memory: float | None, shard: Shard) -> Placement:
    """The device that a recipe wants (auto, cpu, cuda, cuda:N), with at most `memory` GB of a GPU's, or what is free.

    "auto" is a GPU if there is one. Of several processes each has the GPU of its number on its machine. Raises
    `InputError` for a GPU that all processes would share, `EnvironmentLacksError` for one that is not there.
    """
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not here):
        return Placement()
    if not here:
        raise EnvironmentLacksError(
            f"calibration.device: {wanted}: PyTorch {torch.__version__} sees no GPU here; use cpu, or install PyTorch "
            "for the GPU's CUDA version"
        )
    if ":" in wanted and shard.world > 1:
        raise InputError(f"calibration.device: {wanted} is one GPU for {shard.world} processes; use cuda: one for each")
    number = int(wanted.partition(":")[2] or (shard.local_rank if shard.world > 1 else 0))
    if number >= here:
        raise EnvironmentLacksError(
            f"calibration.device: {wanted}: process {shard.rank} would have GPU {number}, but the last one here is "
            f"cuda:{here - 1}"
        )
    device = torch.device("cuda", number)
    free, _ = torch.cuda.mem_get_info(device)
    return Placement(device, free if memory is None else min(free, int(memory * 1e9)))


def module_bytes(model: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class _Loan:
    """Copies on a device of the tensors of some modules, in their places from `begin` to `end`."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self._modules, self._device = tuple(dict.fromkeys(modules)), device
        self._own: list[tuple[_Tensors, str, Tensor]] = []

    def begin(self) -> None:
        """Put the copies in place. Modules that share a tensor share its copy; what is there already stays."""
        copies: dict[int, Tensor] = {}
        for module in self._modules:
            for tensors in cast(tuple[_Tensors, ...], (module._parameters, module._buffers)):
                for name, tensor in _elsewhere(tensors, self._device):
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _copy(tensor, self._device)
                    self._own.append((tensors, name, tensor))
                    tensors[name] = copies[id(tensor)]

    def end(self) -> None:
        """Put the modules' own tensors back; nothing if it has been done."""
        while self._own:
            tensors, name, tensor = self._own.pop()
            tensors[name] = tensor


def _elsewhere(tensors: _Tensors, device: torch.device) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None and tensor.device != device]


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
