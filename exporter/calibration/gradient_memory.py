"""How many tokens may be learned from at once, where nobody says in time that memory does not suffice.

On a GPU PyTorch raises an error, and batches shrink. Linux gives a process any memory and kills it when there is none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# What a batch takes at its peak, in sizes of what is kept for its gradients: that, what the backward pass computes
# meanwhile (on blocks of PixArt 1.4 to 1.6 in all, for every token more), and gaps that the allocator leaves.
_PEAK = 2.5


def tokens_at_once(forward: Callable[[int], object], tokens: int, memory: float) -> int:
    """How many tokens a batch with gradients may have in `memory` bytes: those of 1, 2, 4, 8 … samples, since
    another number changes the order of sums, and what is free differs a little from run to run.

    `forward(n)` computes a loss of n samples, of `tokens` each. It is called for one and for two, of which nothing is
    kept: the difference is what is kept for a sample's gradients, without what is kept for the weights'.
    """
    one, two = (_kept_bytes(forward, samples) for samples in (1, 2))
    fitting = max(1, int(memory / (_PEAK * max(1, two - one))))
    return (1 << (fitting.bit_length() - 1)) * tokens


def _kept_bytes(forward: Callable[[int], object], samples: int) -> int:
    """Bytes that a backward pass would need, of tensors that share their memory once."""
    seen: dict[int, StorageWeakRef] = {}
    kept = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        # While there is a weak reference, no other storage has its address.
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        if seen.setdefault(reference.cdata, reference) is reference:
            kept += storage.nbytes()
        return nothing

    nothing = torch.empty(0)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward(samples)
    return kept
