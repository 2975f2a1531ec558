"""Whether this machine's memory is enough to compare an ONNX model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from exporter.errors import EnvironmentLacksError
from exporter.plan import LayerPlan

# Measured on graphs that fp4export exported: PixArt-α takes 5.6 times its FP32 weights; from 2 to 8 blocks Hunyuan-DiT
# grows by 7.7 times theirs.
_TIMES_WEIGHTS = 8
_GB = 1e9


def refuse_without_room(source: Path, layers: Iterable[LayerPlan], free: int) -> None:
    """Raise `EnvironmentLacksError` if comparing a model with these quantized layers takes more than the `free` bytes
    of memory that there were before it was loaded: it runs in one piece, and a system that runs out of memory would
    end the process without a word."""
    needed = _TIMES_WEIGHTS * sum(layer.fp32_bytes for layer in layers)
    if needed > free:
        raise EnvironmentLacksError(
            f"{source}: comparing a model of this size takes about {needed / _GB:.0f} GB of memory, and "
            f"{free / _GB:.0f} GB are free; use a larger machine, or --no-validate, with which nothing is compared"
        )
