"""How packed weights lie in memory, so that a GPU decodes them without moving anything between threads.

K is cut into tiles of 128 (`Layout`); a group with scales of its own is one or several whole tiles. A row of words is
its tiles' octets, little-endian. Octet j of a tile of T weights holds weight j in its low four bits and weight j + T/2
in its high ones: each half of an octet belongs to an operand of its own, with K in order. 6-bit codes have their low
four magnitude bits there, in a plane in front, and behind all of it a second plane, whose octet j holds two bits of
each of the weights j, j + T/4, j + T/2 and j + 3T/4, the sign above the top magnitude bit.

A float's four bits are its code rotated left: the sign lowest, as the INT8 decoder's tables want it (`asm.py`). Formats
of evenly spaced values are two's complement for INT8 products. There is one zero: -0 becomes 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from plugins.formats import Codes, FloatFormat, Format
from plugins.packing import WORD_BITS, PackingError

MAX_TILE = 128
MIN_TILE = 64
_SIX_BITS = 6
_PLANE_BITS = 4


@dataclass(frozen=True)
class Layout:
    """Packed rows of `count` codes of `fmt` in groups of `group_size` (0: the whole row).

    With `twos_complement` 4-bit fields are values in units of the step, otherwise sign and magnitude.
    """

    fmt: Format
    count: int
    group_size: int
    twos_complement: bool

    @property
    def chunk(self) -> int:
        """Weights in a tile: the largest divisor of the group that fits one."""
        if self.group_size == 0:
            return MAX_TILE
        return max(size for size in range(1, MAX_TILE + 1) if self.group_size % size == 0)

    @property
    def tile(self) -> int:
        """Fields in a tile, a power of two; those beyond the chunk are zero."""
        return MIN_TILE if self.chunk <= MIN_TILE and self.fmt.bits == _PLANE_BITS else MAX_TILE

    @property
    def tiles(self) -> int:
        """Tiles in a row."""
        return -(-self.count // self.chunk)

    @property
    def high_plane(self) -> int:
        """The octet of a row at which the plane of 2-bit fields starts, 0 for 4-bit codes, which have none."""
        return self.tiles * self.tile // 2 if self.fmt.bits == _SIX_BITS else 0

    @property
    def words(self) -> int:
        """INT32 words in a row."""
        return self.tiles * self.tile * self.fmt.bits // WORD_BITS

    def pack(self, codes: Codes) -> npt.NDArray[np.int32]:
        """INT32 [N, words] from uint8 [N, count]. Raises PackingError, NotRepresentableError."""
        if codes.ndim != 2 or codes.shape[1] != self.count:
            raise PackingError(f"codes must be [N, {self.count}], not {list(codes.shape)}")
        fields = self._fields(codes)
        rows = len(codes)
        padded = np.pad(fields, [(0, 0), (0, self.tiles * self.chunk - self.count)]).reshape(rows, -1, self.chunk)
        tiles = np.pad(padded, [(0, 0), (0, 0), (0, self.tile - self.chunk)])
        if self.fmt.bits == _PLANE_BITS:
            return _words(_nibbles(tiles))
        # Of the field s·hhhhh, sign lowest: four low magnitude bits, then sign and top bit.
        quarters = np.stack(np.split(_top(tiles), 4, axis=-1))
        high = np.bitwise_or.reduce([quarter << (2 * place) for place, quarter in enumerate(quarters)])
        return _words(np.concatenate([_nibbles(_octets(tiles >> 1 & 15)), high.reshape(rows, -1)], axis=1))

    def unpack(self, words: npt.NDArray[np.int32]) -> Codes:
        """uint8 [N, count] from INT32 [N, words]: the inverse of `pack`, but for zeros' signs. Raises PackingError."""
        if words.dtype != np.int32 or words.ndim != 2 or words.shape[1] != self.words:
            raise PackingError(f"words must be int32 [N, {self.words}], not {words.dtype} {list(words.shape)}")
        rows = len(words)
        octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
        plane = octets[:, : self.tiles * self.tile // 2].reshape(rows, self.tiles, -1)
        fields = np.concatenate([plane & 15, plane >> 4], axis=-1)
        if self.fmt.bits == _SIX_BITS:
            high = octets[:, self.high_plane :].reshape(rows, self.tiles, -1)
            top = np.concatenate([high >> (2 * place) & 3 for place in range(4)], axis=-1)
            fields = (top >> 1) | (fields << 1) | ((top & 1) << 5)
        fields = fields[:, :, : self.chunk].reshape(rows, -1)[:, : self.count]
        return self._codes(fields)

    def _fields(self, codes: Codes) -> Codes:
        values = self.fmt.decode(codes)
        canonical = self.fmt.encode(np.where(values == 0, np.float32(0), values))
        if self.twos_complement:
            numerators = np.rint(self.fmt.decode(canonical) / self.fmt.step).astype(np.int8)
            return _octets(numerators.astype(np.uint8) & 15)
        sign_magnitude = canonical if isinstance(self.fmt, FloatFormat) else _sign_magnitude(canonical)
        top = self.fmt.bits - 1
        return _octets(((sign_magnitude << 1) & (2**self.fmt.bits - 1)) | (sign_magnitude >> top))

    def _codes(self, fields: Codes) -> Codes:
        if self.twos_complement:
            numerators = ((fields ^ 8).astype(np.int16) - 8).astype(np.float32)
            return self.fmt.encode(numerators * np.float32(self.fmt.step))
        magnitudes, negative = (fields >> 1).astype(np.intp), (fields & 1).astype(np.bool_)
        return self.fmt.with_sign(magnitudes, negative)


def _sign_magnitude(codes: Codes) -> Codes:
    """4-bit two's complement to sign and magnitude; -8 is no code of a symmetric format."""
    negative = codes >> 3
    return np.where(negative == 1, 8 | (16 - codes), codes).astype(np.uint8)


def _nibbles(tiles: Codes) -> Codes:
    half = tiles.shape[-1] // 2
    return _octets(tiles[..., :half] | (tiles[..., half:] << 4)).reshape(len(tiles), -1)


def _top(fields: Codes) -> Codes:
    """Sign above the top magnitude bit."""
    return _octets(((fields & 1) << 1) | (fields >> 5))


def _octets(numbers: npt.NDArray[Any]) -> Codes:
    return np.asarray(numbers, np.uint8)


def _words(octets: Codes) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(octets, np.uint8).view("<i4").astype(np.int32, copy=False)
