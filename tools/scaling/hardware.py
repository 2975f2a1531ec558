"""What is published about GPUs: dense peak rates, memory bandwidth and size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks are dense, in 10¹² operations a second, a multiplication and an addition being two; None where the GPU does
    not have the type, or where no rate is published. Bandwidth in GB/s, memory in GB, both decimal.
    """

    name: str
    memory_gb: float
    bandwidth: float
    bf16: float
    int8: float | None
    fp8: float | None
    source: str

    @property
    def eight_bit(self) -> tuple[str, float]:
        """The container of 8 bits whose rate is known, INT8 before FP8, and its rate."""
        if self.int8 is not None:
            return "INT8", self.int8
        if self.fp8 is None:
            raise ValueError(f"{self.name} has no rate for 8 bits")
        return "FP8", self.fp8


_ORIN_SM_INT8 = 2048
"""Multiplications of 8-bit numbers of a streaming multiprocessor a clock, dense: 4 tensor cores of 512."""


def _orin(name: str, memory_gb: float, bandwidth: float, sms: int, gigahertz: float) -> Gpu:
    """The GPU alone: the TOPS on the box count sparsity, and DLAs, which have no plugins."""
    int8 = 2 * _ORIN_SM_INT8 * sms * gigahertz / 1000
    source = f"{sms} SMs · {_ORIN_SM_INT8} INT8 products · {gigahertz:g} GHz (maximum)"
    return Gpu(name, memory_gb, bandwidth, int8 / 2, int8, None, source)


GPUS = (
    _orin("Orin Nano 8 GB", 8, 68, sms=8, gigahertz=0.625),
    _orin("Orin Nano 8 GB, Super", 8, 102, sms=8, gigahertz=1.02),
    _orin("Orin NX 16 GB", 16, 102.4, sms=8, gigahertz=0.918),
    _orin("AGX Orin 32 GB", 32, 204.8, sms=14, gigahertz=0.93),
    _orin("AGX Orin 64 GB", 64, 204.8, sms=16, gigahertz=1.3),
    Gpu("Thor T5000", 128, 273, 258.5, None, 517, "half of the published sparse rates; INT8 is not published"),
    Gpu("L4", 24, 300, 121, 242, 242, "half of the published sparse rates"),
    Gpu("H100 SXM", 80, 3350, 989, 1979, 1979, "half of the published sparse rates"),
    Gpu("B200 (HGX)", 180, 8000, 2250, 4500, 4500, "published dense rates at 1000 W"),
)
"""The targets' GPUs. Where the figures come from is in docs/scaling.md."""
