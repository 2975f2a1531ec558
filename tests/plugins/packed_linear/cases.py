"""Operators, shapes and tiles whose kernels run in Triton's interpreter, and their inputs: same case, same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from plugins.containers import INT8, multipliers
from plugins.packed_linear.descriptor import PackedLinear
from plugins.packed_linear.reference import DTYPES
from plugins.packed_linear.tactics import Tile

Arrays = dict[str, npt.NDArray[Any]]

WIDE, SMALL = Tile(64, 64, 4, 3, steps=2), Tile(32, 16, 4, 3)
HALVED = Tile(32, 128, 4, 3, steps=2)
"""As many channels as threads."""
SPLIT = Tile(16, 16, 4, 3, splits=2)
SAMPLES = 2


@dataclass(frozen=True)
class Case:
    """One launch: `rows` tokens of an operator, in SAMPLES samples where it has a gate."""

    name: str
    rows: int
    tile: Tile

    @property
    def label(self) -> str:
        """Of a test."""
        return f"{self.name}-{self.rows}x{self.tile.splits}"

    @property
    def variant(self) -> PackedLinear:
        variant = PackedLinear.parse(f"PackedLinear_{self.name}")
        assert variant is not None
        return variant

    @property
    def rows_per_sample(self) -> int:
        return -(-self.rows // SAMPLES)


def _formats() -> list[Case]:
    """Every weight format in every container, with N, M and K that no tile divides."""
    return [
        Case(
            f"{weight}_{container}_{floats}_n37_k200",
            17 if (place + turn) % 2 else 5,
            (SPLIT, WIDE)[(place + turn) % 2],
        )
        for place, weight in enumerate(("e2m1", "e1m2", "e3m0", "int4", "e2m3", "e3m2"))
        for turn, (container, floats) in enumerate(
            (("int8", "fp32"), ("fp8", "fp32"), ("fp16", "fp16"), ("none", "bf16"), ("none", "fp16"))
        )
        if (weight, container) != ("e3m2", "int8")
    ]


def _options() -> list[Case]:
    groups = ("", "_g128m", "_g64s", "_g16m")
    epilogues = ("_bias_gelu", "_bias_residual")
    return [
        Case(f"e2m1_{container}_{floats}_n33_k128{group}{epilogue}", rows, tile)
        for container, floats in (("int8", "fp16"), ("fp8", "bf16"), ("none", "fp16"))
        for place, group in enumerate(groups)
        for epilogue, (rows, tile) in zip(epilogues, ((6, SMALL), (3, SPLIT))[:: 1 - 2 * (place % 2)], strict=True)
    ]


CASES = (
    *_formats(),
    *_options(),
    Case("e2m1_int8_fp32_n16_k4608_bias", 1, Tile(16, 16, 4, 3, splits=8)),
    Case("e2m1_int8_fp32_n64_k128_gelu", 130, WIDE),
    Case("e1m2_int8_fp32_n40_k384_g384m", 16, WIDE),
    Case("e1m2_int8_fp32_n40_k256_g128m", 5, SPLIT),
    Case("e2m3_int8_fp32_n40_k256_g128m", 5, WIDE),
    Case("e2m1_int8_fp32_n130_k384_g128m", 37, HALVED),
    Case("e2m1_int8_fp32_n37_k672_g96m", 70, WIDE),
    Case("e2m1_int8_fp32_n37_k672_g224m", 17, SPLIT),
    Case("e3m0_int8_fp32_n37_k256_g128m", 5, WIDE),
    Case("e2m1_fp8_fp32_n130_k384_g128m", 37, HALVED),
    Case("e2m1_int8_fp32_n130_k256_g128s", 5, HALVED),
    Case("e2m1_int8_fp32_n256_k128", 16, Tile(16, 256, 4, 3)),
    Case("e2m1_int8_fp32_n96_k64_bias_gelu_residual", 40, Tile(64, 64, 1, 3)),
)


def inputs_of(case: Case) -> Arrays:
    """The operator's inputs by name; tokens are rows, and the gate [SAMPLES, N]."""
    variant = case.variant
    generator = np.random.default_rng([case.rows, variant.n, variant.k])
    floats = DTYPES[variant.float_type]
    codes = generator.choice(np.flatnonzero(variant.format.valid), (variant.n, variant.k)).astype(np.uint8)
    groups = variant.k // variant.group_size if variant.group_factors else 1
    scale_columns = groups if variant.group_factors == "scales" else 1
    foldable = multipliers(variant.format, INT8) or (1,)
    drawn: Arrays = {
        "x": generator.standard_normal((case.rows, variant.k)).astype(floats),
        "numbers": _numbers(generator, variant.container, (case.rows, variant.k)),
        "x_scales": generator.uniform(0.001, 0.1, (case.rows, 1)).astype(np.float32),
        "words": variant.layout.pack(codes),
        "weight_scales": generator.uniform(0.001, 0.1, (variant.n, scale_columns)).astype(np.float32),
        "multipliers": generator.choice(foldable, (variant.n, groups)).astype(np.int8),
        "bias": generator.standard_normal(variant.n).astype(np.float32),
        "residual": generator.standard_normal((case.rows, variant.n)).astype(floats),
        "gate": generator.standard_normal((SAMPLES, variant.n)).astype(floats),
    }
    return {name: drawn[name] for name in variant.input_names}


def per_token(case: Case, inputs: Arrays) -> Arrays:
    """The same with every token's own gate, as the reference broadcasts it."""
    if "gate" not in inputs:
        return inputs
    return {**inputs, "gate": inputs["gate"][np.arange(case.rows) // case.rows_per_sample]}


def _numbers(generator: np.random.Generator, container: str, shape: tuple[int, int]) -> npt.NDArray[Any]:
    if container == "int8":
        return generator.integers(-127, 128, shape).astype(np.int8)
    octets = generator.integers(0, 256, shape).astype(np.uint8)
    octets[(octets & 0x7F) == 0x7F] = 0  # no NaN
    return octets.view(ml_dtypes.float8_e4m3fn) if container == "fp8" else octets.view(np.int8)
