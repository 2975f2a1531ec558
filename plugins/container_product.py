"""What multiplying two formats in a container means: how values enter it, which scales fold, whether sums are exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

from plugins.containers import FP8, INT8, Container, activation_factor, factor, fits, multipliers
from plugins.formats import Format


def foldable_multipliers(weight_format: Format, container: Container) -> tuple[int, ...]:
    """The integers by which group scales may exceed their channel's in the container; (1,) where none fold.

    FP16 and FP32 would hold more of them than INT8 does, but get INT8's, so that weights calibrated for the one run
    in the other.
    """
    return multipliers(weight_format, FP8 if container == FP8 else INT8) or (1,)


@dataclass(frozen=True)
class ContainerProduct:
    """Dot products of `k` activations with `k` weights in a container.

    `activation_format` is None where activations stay floats. `multipliers` are the integers that the weights' group
    scales are of their channel's; `free_groups` says that group scales are no such multiples.

    The accumulator is taken at its nominal width, INT32 or FP32; hardware that accumulates FP8 products with fewer
    bits than FP32 (Hopper's tensor cores) is outside this statement.
    """

    weight_format: Format
    activation_format: Format | None
    container: Container
    k: int
    multipliers: tuple[int, ...] = (1,)
    free_groups: bool = False

    @property
    def weight_factor(self) -> float | None:
        """The power of two by which weights, times any of the multipliers, enter; None if they do not fit."""
        return factor(self.weight_format, self.container, max(self.multipliers))

    @property
    def activation_factor(self) -> float | None:
        """The power of two by which activations enter; None if they do not fit, or are not quantized."""
        return None if self.activation_format is None else activation_factor(self.activation_format, self.container)

    @property
    def unheld_multipliers(self) -> tuple[int, ...]:
        """The multipliers with which the weights are not exact in the container."""
        return tuple(sorted(set(self.multipliers) - set(multipliers(self.weight_format, self.container))))

    @property
    def holds_operands(self) -> bool:
        """True if every weight, times every multiplier, and every activation is exactly a number of the container."""
        return not self._misfit

    @property
    def accumulator_bound(self) -> int | None:
        """Largest magnitude of a sum, in products of the formats' steps; None where sums are no integers of those."""
        if self.activation_format is None or self.free_groups:
            return None
        weight = self.weight_format.max_numerator * max(self.multipliers)
        return weight * self.activation_format.max_numerator * self.k

    @property
    def accumulator_bits(self) -> tuple[float, float] | None:
        """log2 of the bound and of the limit: a sum is exact while the first does not exceed the second."""
        if self.accumulator_bound is None:
            return None
        return math.log2(self.accumulator_bound), math.log2(self.container.accumulator_limit)

    @property
    def exact(self) -> bool:
        """True if every sum is exactly the sum of the formats' products."""
        bound = self.accumulator_bound
        return self.holds_operands and bound is not None and bound <= self.container.accumulator_limit

    @property
    def reason(self) -> str:
        """Why it is exact, or what is not."""
        bound, limit = self.accumulator_bound, self.container.accumulator_limit
        if self._misfit:
            return self._misfit
        if self.activation_format is None:
            return "the activations are not quantized, so products are rounded"
        if bound is None:
            return "free group scales do not factor out of the sum, so products are rounded"
        if not self.exact:
            return f"products are exact, but sums of {self.k} reach {bound}, past the accumulator's {limit}"
        return f"sums of {self.k} products stay within {bound} ≤ {limit}"

    @property
    def _misfit(self) -> str:
        """What the container does not hold, empty if it holds all operands."""
        for fmt in (self.weight_format, self.activation_format):
            if fmt is not None and not fits(fmt, self.container):
                return f"{fmt.name} has values that {self.container.name} does not hold"
        if not self.unheld_multipliers:
            return ""
        largest = multipliers(self.weight_format, self.container)[-1]
        return (
            f"{self.weight_format.name} times {self.unheld_multipliers[-1]} is not exact in {self.container.name}; "
            f"largest multiplier: {largest}"
        )
