"""What a graph computes in outside its quantized linears: FP32, FP16 or BF16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from exporter.errors import InputError
from exporter.targets import TARGETS, Target

Compute = Literal["fp32", "fp16", "bf16"]

_BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class ComputeType:
    """A floating-point type that tensors are stored in between two operators."""

    name: Compute
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """Size of one number."""
        return self.dtype.itemsize

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return _largest_and_smallest(self.dtype)[0]

    @property
    def smallest_normal(self) -> float:
        """The smallest number with a full significand."""
        return _largest_and_smallest(self.dtype)[1]

    def rounded(self, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """`array` rounded to this type and back, float32; beyond `largest` infinite."""
        with np.errstate(over="ignore"):
            return array.astype(self.dtype).astype(np.float32)


def _largest_and_smallest(dtype: np.dtype[Any]) -> tuple[float, float]:
    facts = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(facts.max), float(facts.smallest_normal)


COMPUTE_TYPES: Mapping[Compute, ComputeType] = MappingProxyType(
    {
        "fp32": ComputeType("fp32", np.dtype(np.float32)),
        "fp16": ComputeType("fp16", np.dtype(np.float16)),
        "bf16": ComputeType("bf16", np.dtype(ml_dtypes.bfloat16)),
    }
)


def check_compute(recipe: str, compute: Compute, target: Target) -> None:
    """Raise `InputError` unless `target` computes in `compute`; `recipe` is what the message starts with."""
    if compute == "fp32":
        return
    if target.engine == "onnxruntime":
        raise InputError(
            f"{recipe}: compute: {compute}: ONNX Runtime's CPU kernels compute in FP32 and lack many operators of "
            f"other types, so target {target.name} takes fp32; fp16 and bf16 are for TensorRT targets"
        )
    if compute == "bf16" and (target.compute_capability or _BF16_CAPABILITY) < _BF16_CAPABILITY:
        others = [
            name
            for name, other in TARGETS.items()
            if other.engine == target.engine and (other.compute_capability or _BF16_CAPABILITY) >= _BF16_CAPABILITY
        ]
        raise InputError(
            f"{recipe}: compute: bf16: target {target.name} has no BF16 arithmetic (it begins with compute capability "
            f"8.0); use fp16, or a target that has: {', '.join(others)}"
        )
