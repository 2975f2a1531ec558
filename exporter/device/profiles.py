"""Sizes that an engine takes: its optimization profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import onnx

from exporter.errors import InputError

Shapes: TypeAlias = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes that an engine takes, and the one it is tuned for."""

    minimum: int = 1
    best: int = 2
    maximum: int = 16

    def __post_init__(self) -> None:
        sizes = (self.minimum, self.best, self.maximum)
        if not 1 <= self.minimum <= self.best <= self.maximum:
            raise InputError(f"batch sizes (minimum, best, maximum) must be positive and ascending, not {sizes}")

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """``MIN:BEST:MAX``, or ``N`` for one size alone. Raises `InputError` for anything else."""
        words = text.split(":")
        if len(words) not in (1, 3) or not all(word.isascii() and word.isdecimal() for word in words):
            raise InputError(f"--batch {text}: must be MIN:BEST:MAX, for example 1:2:16, or one number")
        sizes = [int(word) for word in words]
        return cls(*(sizes * 3 if len(sizes) == 1 else sizes))


def profile_shapes(model: onnx.ModelProto, batch: BatchRange) -> Shapes:
    """(min, opt, max) of every graph input that has a dynamic dimension; such dimensions are all the batch."""
    constants = {tensor.name for tensor in model.graph.initializer}
    shapes = {}
    for value in model.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        if value.name in constants or all(dimension.HasField("dim_value") for dimension in dimensions):
            continue
        shapes[value.name] = tuple(
            tuple(dimension.dim_value if dimension.HasField("dim_value") else size for dimension in dimensions)
            for size in (batch.minimum, batch.best, batch.maximum)
        )
    return {name: (least, best, most) for name, (least, best, most) in shapes.items()}
