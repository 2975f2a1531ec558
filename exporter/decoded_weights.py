"""Packed words → weights, in one look-up for two codes of four bits."""

from __future__ import annotations

import torch
from torch import Tensor

from plugins.formats import Format
from plugins.packing import unpack

_PAIRED_BITS = 4
_OCTETS = 256


def unpacked_codes(words: Tensor, fmt: Format, count: int) -> Tensor:
    """The codes uint8 [N, count] in `words` int32 [N, W], on the CPU."""
    return torch.from_numpy(unpack(words.numpy(force=True), fmt.bits, count))


def unpacked_weight(words: Tensor, scales: Tensor, fmt: Format, count: int) -> Tensor:
    """decode(code)·scale float32 [N, count] of `words` int32 [N, W] and `scales` float32 [N, G], on their device."""
    if fmt.bits == _PAIRED_BITS and count % 2 == 0:
        values = _pairs(words.to(scales.device), fmt, count)
    else:
        table = torch.tensor(fmt.values, device=scales.device)
        values = table[unpacked_codes(words, fmt, count).to(scales.device).int()]
    values.view(len(values), scales.shape[1], -1).mul_(scales.unsqueeze(-1))
    return values


def _pairs(words: Tensor, fmt: Format, count: int) -> Tensor:
    """Every octet of the words holds two codes, the low nibble first: it picks two float32 as one number of 8 bytes."""
    values = torch.tensor(fmt.values, device=words.device)
    octets = torch.arange(_OCTETS, device=words.device)
    table = torch.stack([values[octets & 15], values[octets >> 4]], dim=1).view(torch.float64).flatten()
    rows = words.contiguous().view(torch.uint8)[:, : count // 2]
    return table.index_select(0, rows.flatten().int()).view(torch.float32).view(len(words), count)
