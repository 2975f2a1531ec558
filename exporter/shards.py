"""Which of several processes this one is, as torchrun and accelerate tell it, and what they do together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from exporter.errors import EnvironmentLacksError, InputError

_T = TypeVar("_T")

# Ranks wait for the slowest one's images, and for an export.
_PATIENCE = timedelta(days=7)


def _backend() -> str:
    """What tensors in main memory are exchanged by, and those on GPUs where PyTorch has support for them."""
    return "cpu:gloo,cuda:nccl" if torch.distributed.is_nccl_available() else "gloo"


@dataclass(frozen=True)
class Shard:
    """Process `rank` of `world`, the `local_rank`-th on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Shard:
        """From RANK, WORLD_SIZE and LOCAL_RANK; one process without them. Raises `InputError` for nonsense."""
        try:
            rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
            local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
        except ValueError as error:
            raise InputError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, as torchrun sets them: {error}"
            ) from error
        if not 0 <= rank < world:
            raise InputError(f"RANK is {rank}, but WORLD_SIZE is {world}")
        return cls(rank, world, local_rank)

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def mine(self, items: Sequence[_T]) -> Sequence[_T]:
        """Every `world`-th of the items, from number `rank` on."""
        return items[self.rank :: self.world]

    def device(self, device: str) -> str:
        """`cuda` as this process's own GPU; anything else stays as it is."""
        return f"cuda:{self.local_rank}" if device == "cuda" and self.world > 1 else device

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Be able to `wait` inside; a single process needs nothing.

        Raises `InputError` where nothing says how the processes find each other. Inside, whatever they do together
        raises `EnvironmentLacksError` as soon as one of them has ended.
        """
        if self.world == 1:
            yield
            return
        try:
            with self._together():
                torch.distributed.init_process_group(
                    _backend(), rank=self.rank, world_size=self.world, timeout=_PATIENCE
                )
        except ValueError as error:
            raise InputError(
                f"WORLD_SIZE is {self.world}, but {error}: start all processes with torchrun, or unset RANK and "
                "WORLD_SIZE for a single one"
            ) from error
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise EnvironmentLacksError(
                f"process {self.rank} of {self.world}: another process has ended or cannot be reached; what it said "
                "tells why"
            ) from error

    def wait(self) -> None:
        """Go on when all processes are here."""
        # Not a barrier, for which PyTorch would take the GPUs where it has support for them.
        self.add_up(torch.zeros(1))

    def agree(self, value: bool) -> bool:
        """What the first process says."""
        said = torch.tensor([value])
        if self.world > 1:
            with self._together():
                torch.distributed.broadcast(said, 0)
        return bool(said)

    def all_have(self, value: int) -> bool:
        """Whether all processes' values, of at most 48 bits, come to what they would be if all had this one's. Where
        they differ, that is not so in one of them at least."""
        return int(self.add_up(torch.tensor(value))) == value * self.world

    def check_alike(self, key: str) -> None:
        """Raise `InputError` where another process has another key, a hash in hexadecimal digits."""
        if not self.all_have(int(key[:12], 16)):
            raise InputError(
                f"process {self.rank} of {self.world} is not like the others: all need the same recipe, fp4export, "
                "libraries and kind of device"
            )

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over all processes, the same bits in each."""
        if self.world > 1:
            with self._together():
                torch.distributed.all_reduce(tensor)
        return tensor

    def largest(self, value: float) -> float:
        """The largest of all processes' values."""
        if self.world == 1:
            return value
        most = torch.tensor([value], dtype=torch.float64)
        with self._together():
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return float(most)
