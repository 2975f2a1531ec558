"""Descriptions of the sample kernels, without Triton."""

from __future__ import annotations

from dataclasses import dataclass

from plugins.kernels.hardware import Capability, hardware_of
from plugins.kernels.spec import KernelSpec, Launch, Pointer

MODULE = "tests.plugins.kernels.sample_kernel"


def scale_rows(name: str = "scale_rows_k64", rows: int = 4, num_warps: int = 2) -> KernelSpec:
    """y fp16 [rows, 64] = x · factor + factor."""
    return KernelSpec(
        name=name,
        source=f"{MODULE}:scale_rows",
        inputs=(Pointer("x", "fp16"), Pointer("factors", "fp32")),
        scalars=("rows",),
        outputs=(Pointer("y", "fp16"),),
        constants={"K": 64, "ROWS": rows},
        launch=Launch(rows_per_program=rows, columns=1, num_warps=num_warps),
    )


def multiply(size: int, stages: int) -> KernelSpec:
    """Needs 2·stages·2·size² bytes of shared memory."""
    return KernelSpec(
        name=f"multiply_{size}",
        source=f"{MODULE}:multiply",
        inputs=(Pointer("x", "fp16"), Pointer("w", "fp16")),
        scalars=("rows",),
        outputs=(Pointer("y", "fp16"),),
        constants={"SIZE": size, "STAGES": stages},
        launch=Launch(rows_per_program=1, columns=1, num_warps=4),
        num_stages=stages,
    )


def to_fp8() -> KernelSpec:
    """Uses E4M3, which sm_80 … sm_87 do not have."""
    return KernelSpec(
        name="to_fp8",
        source=f"{MODULE}:to_fp8",
        inputs=(Pointer("x", "fp32"),),
        scalars=("rows",),
        outputs=(Pointer("y", "i8"),),
        constants={"K": 128},
        launch=Launch(rows_per_program=1, columns=1, num_warps=1),
    )


@dataclass(frozen=True)
class ScaleRows:
    """An operator with two tactics."""

    op_type: str = "ScaleRows_k64"

    def kernels(self, capability: Capability) -> tuple[KernelSpec, ...]:
        """Few rows a program, then many."""
        label = hardware_of(capability).label
        return tuple(scale_rows(f"{self.op_type}_{label}_t{tactic}", rows) for tactic, rows in enumerate((4, 16)))
