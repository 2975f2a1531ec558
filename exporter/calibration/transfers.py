"""Activations on their way to the device that computes and back.

Between main memory and a GPU they go through pinned buffers, which PyTorch keeps for the next time: copies there are
several times as fast as those of ordinary memory, and the GPU goes on computing meanwhile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.calibration.activations import ActivationStore


def on_device(activations: Tensor, indices: Tensor | slice, device: torch.device) -> Tensor:
    """The samples at `indices` of `activations` [M, ...], on the device."""
    if device.type != "cuda" or activations.device.type == "cuda":
        return activations[indices].to(device)
    if isinstance(indices, slice):
        chosen = activations[indices]
        staged = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True).copy_(chosen)
    else:
        shape = (len(indices), *activations.shape[1:])
        staged = torch.empty(shape, dtype=activations.dtype, pin_memory=True)
        torch.index_select(activations, 0, indices, out=staged)
    return staged.to(device, non_blocking=True)


class Gathered:
    """A tensor [M, ...] that comes in parts, and is where `store` keeps activations."""

    def __init__(self, samples: int, store: ActivationStore) -> None:
        self._samples, self._store = samples, store
        self._tensor: Tensor | None = None
        # The last part, while it may still be on its way from the GPU.
        self._coming: tuple[slice, Tensor, torch.cuda.Event] | None = None

    def put(self, part: slice, values: Tensor) -> None:
        """Take the samples of one part."""
        if self._tensor is None:
            self._tensor = self._store.empty((self._samples, *values.shape[1:]), values.dtype)
        if values.device.type != "cuda" or self._tensor.device.type == "cuda":
            self._tensor[part] = values
            return
        staged = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record(torch.cuda.current_stream(values.device))
        # The one before it is written now, while the GPU is busy with this one.
        self._arrive()
        self._coming = part, staged, sent

    def _arrive(self) -> None:
        if self._coming is not None and self._tensor is not None:
            part, staged, sent = self._coming
            sent.synchronize()
            self._tensor[part] = staged
            self._coming = None

    @property
    def tensor(self) -> Tensor:
        """All of them, once every part was put."""
        self._arrive()
        if self._tensor is None:
            raise ValueError("there are no samples")
        return self._tensor
