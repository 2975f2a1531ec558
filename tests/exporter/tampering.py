"""Changes to the 4-bit codes [K, N] of a layer in a finished CPU file, small enough to hide from a careless check."""

from __future__ import annotations

import ml_dtypes
import numpy as np

Arrays = dict[str, np.ndarray]


def flip_a_bit_of_one_code(arrays: Arrays, layer: str) -> str:
    """Returns the name of the changed initializer."""
    name, codes = _codes_of(arrays, layer)
    codes[3, 2] ^= 2
    arrays[name] = codes.astype(ml_dtypes.uint4)
    return name


def swap_two_codes(arrays: Arrays, layer: str) -> str:
    """Two different weights of an output channel, other than the two zeros; returns the initializer's name."""
    name, codes = _codes_of(arrays, layer)
    other = next(index for index in range(len(codes)) if codes[index, 5] & 7 != codes[0, 5] & 7)
    codes[[0, other], 5] = codes[[other, 0], 5]
    arrays[name] = codes.astype(ml_dtypes.uint4)
    return name


def _codes_of(arrays: Arrays, layer: str) -> tuple[str, np.ndarray]:
    (name,) = (name for name, array in arrays.items() if name.startswith(layer) and array.dtype == ml_dtypes.uint4)
    return name, arrays[name].astype(np.uint8)
