"""What a GPU kernel is before it is compiled: its source, arguments, constants and launch.

One description serves everything that runs or ships a kernel: Triton's interpreter, the compiler that makes PTX ahead
of time, TensorRT's plugins and the CUDA driver. It imports none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Constant: TypeAlias = int | float | str | bool | None
Scalar: TypeAlias = Literal["rows", "rows_per_sample"]


@dataclass(frozen=True)
class Pointer:
    """A tensor argument: its name, and its element type as Triton writes it (``fp16``, ``i8``, ``fp8e4nv``, …)."""

    name: str
    element: str


@dataclass(frozen=True)
class Launch:
    """A one-dimensional grid of ceil(rows / rows_per_program) · columns programs of `num_warps` warps.

    `rows` is the number of tokens: the product of all dimensions of the first input but the last.
    """

    rows_per_program: int
    columns: int
    num_warps: int

    def programs(self, rows: int) -> int:
        """Size of the grid."""
        return -(-rows // self.rows_per_program) * self.columns


@dataclass(frozen=True)
class KernelSpec:
    """A kernel with its formats, sizes and tile fixed, for any compute capability that has its instructions.

    `source` is ``package.module:function``, a function that Triton compiles. Its parameters, in TensorRT's order, are
    `inputs`, then `scalars` (int32), then `outputs`; `constants` take theirs by name, wherever they stand, and None
    takes the place of an argument that this operator does not have. `scalars` are ``rows``, and ``rows_per_sample``
    where a modulation row serves several tokens: rows divided by how many rows the last input has.
    `name` is unique among all kernels: it is the PTX entry's and the file's name.
    """

    name: str
    source: str
    inputs: tuple[Pointer, ...]
    scalars: tuple[Scalar, ...]
    outputs: tuple[Pointer, ...]
    constants: Mapping[str, Constant]
    launch: Launch
    num_stages: int = 1
