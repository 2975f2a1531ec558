"""Weights decoded from packed words are the values of their codes times their scales, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporter.decoded_weights import unpacked_codes, unpacked_weight
from plugins.formats import FORMATS, get_format
from plugins.packing import PACKED_BITS, pack


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.bits in PACKED_BITS and name != "e8m0"])
@pytest.mark.parametrize("count", [6, 9, 24])
def test_every_code_at_every_place(name: str, count: int) -> None:
    fmt = get_format(name)
    valid = np.flatnonzero(fmt.valid).astype(np.uint8)
    codes = np.resize(valid, (len(valid), count)) if len(valid) % count else np.resize(valid, (len(valid) + 1, count))
    scales = torch.linspace(0.3, 3.0, len(codes) * 3).reshape(-1, 3)
    words = torch.from_numpy(pack(codes, fmt.bits))
    assert np.array_equal(unpacked_codes(words, fmt, count).numpy(), codes)
    expected = fmt.values[codes].astype(np.float32) * np.repeat(scales.numpy(), count // 3, axis=1)
    found = unpacked_weight(words, scales, fmt, count).numpy()
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
