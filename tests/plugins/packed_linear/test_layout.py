"""The packed order: there and back, where each weight lies, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from plugins.formats import FORMATS, NotRepresentableError
from plugins.packed_linear.encoding import Element, Encoding
from plugins.packed_linear.layout import Layout
from plugins.packing import PackingError

FORMAT_NAMES = ("e2m1", "e1m2", "e3m0", "int4", "e2m3", "e3m2")
SHAPES = [(128, 0), (200, 0), (1, 0), (384, 128), (384, 384), (96, 96), (128, 64), (48, 16), (130, 26)]


def all_codes(name: str, rows: int, count: int) -> np.ndarray:
    valid = np.flatnonzero(FORMATS[name].valid).astype(np.uint8)
    return np.random.default_rng(count).choice(valid, (rows, count))


@pytest.mark.parametrize("element", [Element.INT8, Element.FP8])
@pytest.mark.parametrize(("count", "group_size"), SHAPES)
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_unpack_inverts_pack(name: str, count: int, group_size: int, element: Element) -> None:
    layout = Encoding(FORMATS[name], element).layout(count, group_size)
    codes = all_codes(name, 5, count)
    words = layout.pack(codes)
    assert words.shape == (5, layout.words)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(FORMATS[name].decode(layout.unpack(words)), FORMATS[name].decode(codes))


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_no_negative_zero_is_stored(name: str) -> None:
    fmt = FORMATS[name]
    layout = Layout(fmt, 2, 0, twos_complement=False)
    negative_zero = np.array([[1 << (fmt.bits - 1), 0]], np.uint8)
    if name != "int4":  # which has none
        np.testing.assert_array_equal(layout.pack(negative_zero), np.zeros((1, layout.words), np.int32))


def test_halves_of_an_octet_are_halves_of_a_tile() -> None:
    layout = Layout(FORMATS["e2m1"], 256, 0, twos_complement=False)
    codes = np.zeros((1, 256), np.uint8)
    codes[0, [3, 64 + 3, 128 + 5]] = 0b0101, 0b1011, 0b0001
    octets = layout.pack(codes).view(np.uint8)[0]
    # Rotated left: the sign is the lowest bit.
    assert octets[3] == 0b0111_1010
    assert octets[64 + 5] == 0b0010
    assert np.count_nonzero(octets) == 2


def test_planes_of_six_bit_codes() -> None:
    layout = Layout(FORMATS["e2m3"], 128, 0, twos_complement=False)
    codes = np.zeros((1, 128), np.uint8)
    codes[0, [1, 33, 65, 97]] = 0b1_1_0001, 0b0_1_0010, 0b1_0_0011, 0b0_0_0100
    octets = layout.pack(codes).view(np.uint8)[0]
    assert layout.high_plane == 64
    assert (octets[1], octets[33]) == (0b0011_0001, 0b0100_0010)
    assert octets[64 + 1] == 0b00_10_01_11
    assert layout.words == 24


def test_every_group_starts_a_tile() -> None:
    layout = Layout(FORMATS["e2m1"], 192, 96, twos_complement=False)
    assert (layout.chunk, layout.tile, layout.tiles) == (96, 128, 2)
    codes = np.ones((1, 192), np.uint8)
    fields = layout.pack(codes).view(np.uint8).reshape(2, 64)
    np.testing.assert_array_equal(fields, [[0x22] * 32 + [0x02] * 32] * 2)


def test_refuses_what_does_not_fit() -> None:
    layout = Layout(FORMATS["e2m1"], 8, 0, twos_complement=False)
    with pytest.raises(PackingError, match=r"codes must be \[N, 8\], not \[1, 9\]"):
        layout.pack(np.zeros((1, 9), np.uint8))
    with pytest.raises(PackingError, match=r"words must be int32 \[N, 16\], not int32 \[1, 3\]"):
        layout.unpack(np.zeros((1, 3), np.int32))
    with pytest.raises(NotRepresentableError, match="codes must lie in 0…15"):
        layout.pack(np.full((1, 8), 16, np.uint8))
