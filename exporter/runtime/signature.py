"""What a graph or an engine takes and gives, and whether given tensors fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.errors import InputError, did_you_mean


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: its name, numpy type (None for types that numpy lacks) and sizes (a name where dynamic)."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str, ...]


def check_shapes(owner: str, specs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The sizes that the dynamic dimensions of `specs` have in `shapes` (input name → its shape).

    Raises `InputError`, beginning with `owner`, for a missing, unknown or misshapen input.
    """
    known = [spec.name for spec in specs]
    for name in shapes:
        if name not in known:
            raise InputError(f"{owner}: no input {name!r}{did_you_mean(name, known)}")
    sizes: dict[str, int] = {}
    for spec in specs:
        if spec.name not in shapes:
            raise InputError(f"{owner}: input {spec.name!r} is missing; it needs {', '.join(known)}")
        shape = shapes[spec.name]
        fits = len(shape) == len(spec.shape) and all(
            size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size))
            for size, wanted in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            wanted_shape = ", ".join(str(size) for size in spec.shape)
            raise InputError(
                f"{owner}: input {spec.name!r} must be [{wanted_shape}], not {list(shape)}"
                + "".join(f"; {name} is {size} here" for name, size in sizes.items() if name in spec.shape)
            )
    return sizes
