"""The kernels, in Triton's interpreter, against the reference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from plugins.kernels.hardware import Capability
from plugins.packed_linear import tactics
from plugins.packed_linear.reference import DTYPES, activations, packed_linear, weights
from tests.plugins.packed_linear.cases import CASES, Case, inputs_of, per_token
from tests.plugins.triton_interpreter import TritonInterpreter

# Hopper's kernels promote FP8 sums, and multiply both halves of octets at once; others multiply them one by one. Half
# of the cases are Hopper's; kernels that share out K are the same for all.
HOPPER, ADA = (9, 0), (8, 9)
LAUNCHES = [
    (case, HOPPER if case.tile.splits > 1 or "_k384" in case.name else (HOPPER, ADA)[index % 2])
    for index, case in enumerate(CASES)
] + [(case, ADA) for case in CASES if case.tile.splits == 1 and "_int8_" in case.name and "_k384" in case.name]


@pytest.mark.parametrize(
    ("case", "capability"), LAUNCHES, ids=lambda entry: entry.label if isinstance(entry, Case) else entry[0]
)
def test_kernel_equals_the_reference(case: Case, capability: Capability, interpreter: TritonInterpreter) -> None:
    variant = case.variant
    spec = tactics.kernel(variant, case.tile, "interpreted", capability)
    # The interpreter has no assembly.
    constants = {name: "" for name in spec.constants if name.startswith("ASM")}
    scalars = {"rows": case.rows, "rows_per_sample": case.rows_per_sample}
    y = np.full((case.rows, variant.n), np.nan, DTYPES[variant.float_type])
    found = interpreter.run(spec, inputs_of(case), scalars, {"y": y}, **constants)["y"].astype(np.float64)
    inputs = per_token(case, inputs_of(case))
    expected = packed_linear(variant, inputs).astype(np.float64)
    if variant.container == "int8" and variant.group_factors != "scales":
        # The sums are exact, and every operation after them rounds once in either.
        np.testing.assert_array_equal(found, expected)
        return
    np.testing.assert_array_less(np.abs(found - expected), _bound(case, inputs, expected))


def _bound(case: Case, inputs: Mapping[str, np.ndarray], expected: np.ndarray) -> np.ndarray:
    """An FP32 sum in any order is off by at most K half-ulps of Σ|terms|; typically it is √K of them, taken twice.

    To that come four operations behind the sum and the rounding to the output's type, half an ulp each. GELU's slope
    stays below 1.13.
    """
    variant = case.variant
    absolute = _absolute_sums(case, inputs)
    gate = np.abs(inputs["gate"].astype(np.float64)) if "gate" in inputs else 1.0
    bias = np.abs(inputs["bias"].astype(np.float64)) if "bias" in inputs else 0.0
    single = 2.0**-24 * 1.13 * gate * ((2 * np.sqrt(variant.k) + 4) * absolute + 4 * bias)
    rounding = (
        np.finfo(np.float32).eps
        if variant.float_type == "fp32"
        else 2 * 2.0 ** -(11 if variant.float_type == "fp16" else 8)
    )
    return single + rounding * np.abs(expected) + 1e-30


def _absolute_sums(case: Case, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Σ|numbers·weights| with its scales, float64."""
    variant = case.variant
    weight = np.abs(weights(variant, inputs["words"]))
    if variant.group_factors:
        factors = inputs["multipliers" if variant.group_factors == "multipliers" else "weight_scales"]
        weight = weight * np.repeat(factors.astype(np.float64), variant.group_size, axis=1)
    if variant.group_factors != "scales":
        weight = weight * inputs["weight_scales"].astype(np.float64)
    x = np.abs(activations(variant, inputs))
    return x @ weight.T * (inputs["x_scales"].astype(np.float64) if variant.is_quantized else 1.0)
