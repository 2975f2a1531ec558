"""Activations of all samples: where they are kept, and how many samples are computed at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporter.errors import EnvironmentLacksError

# Enough for a matrix product to be worth its weights, few enough for a feed-forward layer's inside to stay small.
_TOKENS_AT_ONCE = 2048
_UNLIMITED = 1 << 62

# What PyTorch's allocators of main memory, pinned or not, and cuBLAS say in a RuntimeError; that of a GPU has an error
# of its own.
_NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


class BatchLimit:
    """At most so many tokens go through a model or a block at once.

    Whenever they do not fit the memory, half as many do from then on. Only the order of sums changes with it.
    """

    def __init__(self, tokens: int = _TOKENS_AT_ONCE) -> None:
        self.tokens = tokens

    @classmethod
    def unlimited(cls) -> BatchLimit:
        """As many as are asked for, until they do not fit."""
        return cls(_UNLIMITED)

    def lower(self, tokens: int) -> None:
        """At most so many from now on."""
        self.tokens = min(self.tokens, tokens)

    def samples(self, wanted: int, tokens: int) -> int:
        """How many of `wanted` samples, of `tokens` each, go at once: at least one."""
        return min(wanted, max(1, self.tokens // tokens))

    def each(self, samples: int, tokens: int, work: Callable[[slice], None]) -> None:
        """`work` on all samples, some at once. It may see the same ones again, fewer at once."""
        done = 0
        while done < samples:
            size = self.samples(samples - done, tokens)
            part = slice(done, done + size)
            if self.fits(size, tokens, lambda part=part: work(part)):  # type: ignore[misc]
                done += size

    def fits(self, samples: int, tokens: int, work: Callable[[], None]) -> bool:
        """Do the work on so many samples. False, with a lower limit, where memory does not suffice.

        Raises `EnvironmentLacksError` where it does not suffice for a single sample.
        """
        try:
            work()
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if samples == 1:
                raise EnvironmentLacksError(f"a sample of {tokens} tokens does not fit the memory: {error}") from error
        else:
            return True
        # Here, where the error and all that its frames hold are gone.
        self.tokens = samples // 2 * tokens
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in _NO_MEMORY)


@dataclass(frozen=True)
class ActivationStore:
    """Keeps activations in the memory of `device`, or in files in `folder`, which the system reads and writes as they
    are used.

    The files have no names, so that nothing is left of them whatever ends the process.
    """

    folder: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to be filled. Raises `EnvironmentLacksError` where the GPU or the disk has no room for it."""
        size = int(np.prod(shape)) * dtype.itemsize
        if self.folder is None or size == 0:
            try:
                return torch.empty(*shape, dtype=dtype, device=self.device)
            except torch.OutOfMemoryError as error:
                raise EnvironmentLacksError(
                    f"{self.device}: no room for {size / 1e9:.1f} GB more of activations: {error}; with less "
                    "calibration.device_memory they are kept in main memory"
                ) from error
        with tempfile.TemporaryFile(dir=self.folder) as file:
            # Now, instead of a crash when the disk turns out to be full in the middle of it.
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise EnvironmentLacksError(
                    f"{self.folder}: {size / 1e9:.1f} GB for activations: {error.strerror}; make room and run the same "
                    "command again to go on"
                ) from error
            mapped = np.memmap(file, np.uint8, "r+", shape=(size,))
        return torch.from_numpy(mapped).view(dtype).view(*shape)


def choose_store(trajectories: int, per_trajectory: int, memory: int, folder: Path) -> ActivationStore:
    """In memory where `memory` bytes suffice for so many trajectories, else in `folder`.

    Raises `EnvironmentLacksError` where neither has room.
    """
    if trajectories * per_trajectory <= memory:
        return ActivationStore()
    free = shutil.disk_usage(folder).free
    if trajectories * per_trajectory > free:
        raise EnvironmentLacksError(
            f"calibration.samples: {trajectories} trajectories need {trajectories * per_trajectory / 1e9:.1f} GB for "
            f"activations, calibration.memory allows {memory / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            f"at most {max(memory, free) // per_trajectory} fit; raise calibration.every, give --work-dir on a larger "
            "disk, or method.name=gptq, which needs none"
        )
    return ActivationStore(folder)
