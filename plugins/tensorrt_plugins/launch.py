"""A kernel's launch in TensorRT's symbolic integers, which it evaluates when an engine's shapes are known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import mul
from typing import Any

from plugins.kernels.hardware import WARP_SIZE
from plugins.kernels.library import LibraryKernel


def launch(trtp: Any, kernel: LibraryKernel, shapes: Sequence[Sequence[Any]]) -> tuple[Any, Any]:
    """The kernel's launch parameters, and the scalars between its input and its output pointers.

    `shapes` are the inputs', symbolic. `trtp` is `tensorrt.plugin`.
    """
    rows = reduce(mul, list(shapes[0])[:-1])
    programs = trtp.cdiv(rows, kernel.launch.rows_per_program)
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x = programs * kernel.launch.columns
    parameters.block_x = kernel.launch.num_warps * WARP_SIZE
    parameters.shared_mem = kernel.shared_bytes
    scalars = trtp.SymIntExprs(len(kernel.scalars))
    for index, name in enumerate(kernel.scalars):
        value = rows if name == "rows" else rows // shapes[-1][0]
        scalars[index] = trtp.SymInt32(value)
    return parameters, scalars
