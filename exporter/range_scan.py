"""`fp4export ranges`: how large the numbers get that an FP16 or BF16 engine would store, and what that costs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from exporter.activation_room import check_room
from exporter.calibration_stages import calibrated_weights, captured_inputs, formats_chosen
from exporter.compute import COMPUTE_TYPES
from exporter.job import Job
from exporter.model_stages import balanced, transformed
from exporter.ranges import HEADROOM, Amax, measured_ranges
from exporter.source import load_source
from exporter.stages import exported_graph, fake_quantized

Verdict = Literal["not finite", "infinite", "tight", "fits", "loses bits"]

_BAR = 30
# Where the bars start: anything smaller is no matter of overflow.
_SMALLEST_SHOWN = 2.0**-4


@dataclass(frozen=True)
class Range:
    """One tensor: its largest magnitude over the captured inputs (None for a NaN), and what FP16 and BF16 make of it.

    `fp16`: "infinite" beyond FP16's largest number, "tight" within `HEADROOM` of it, "loses bits" where even the
    largest lies below FP16's normal numbers, "not finite" where FP32 itself overflows. `bf16_error` is how far BF16
    may move the largest number by rounding it.
    """

    tensor: str
    place: str
    amax: float | None
    fp16: Verdict
    bf16_error: float | None

    @classmethod
    def of(cls, found: Amax) -> Range:
        """Judge a measurement."""
        value = found.value if math.isfinite(found.value) else None
        error = None if value is None else value * COMPUTE_TYPES["bf16"].relative_error
        return cls(found.tensor, found.place, value, _verdict(found.value), error)


@dataclass(frozen=True)
class RangeScan:
    """All tensors that a compute type would be used for, the largest first, and how many inputs they were seen on."""

    name: str
    inputs: int
    ranges: tuple[Range, ...]

    @classmethod
    def of(cls, name: str, inputs: int, found: Iterable[Amax]) -> RangeScan:
        """Judge and sort measurements; what is not finite comes first."""
        return cls(name, inputs, largest_first(found))

    def count(self, *verdicts: Verdict) -> int:
        """How many tensors FP16 treats so."""
        return sum(one.fp16 in verdicts for one in self.ranges)

    @property
    def verdict(self) -> str:
        """One sentence."""
        worst = self.ranges[0]
        broken = self.count("not finite")
        if broken:
            return (
                f"FP32 itself overflows in {broken} of {len(self.ranges)} tensors, most at {worst.place}: no type "
                "holds them; check the weights and the prompts"
            )
        over = self.count("infinite")
        if over:
            return f"FP16 overflows in {over} of {len(self.ranges)} tensors, most at {worst.place}: use bf16 or fp32"
        tight = self.count("tight")
        if tight:
            return (
                f"{tight} of {len(self.ranges)} tensors leave FP16 less than a factor of {HEADROOM:g}: use bf16 or fp32"
            )
        return f"FP16 holds all {len(self.ranges)} tensors with a factor of {HEADROOM:g} to spare"

    def to_json(self) -> str:
        """One indented JSON document with the same names, and the verdict."""
        return json.dumps({"verdict": self.verdict, **asdict(self)}, indent=1)


def largest_first(found: Iterable[Amax]) -> tuple[Range, ...]:
    """Judge and sort measurements; what is not finite comes first."""
    ranges = [Range.of(one) for one in found]
    return tuple(sorted(ranges, key=lambda one: -math.inf if one.amax is None else -one.amax))


def scan_ranges(job: Job) -> RangeScan:
    """Run the job's stages up to the exported graph, as far as the work folder lacks them, and measure it in FP32."""
    with job.work.locked():
        check_room(job)
        source = load_source(job)
        captured = captured_inputs(job, source)
        source = transformed(job, balanced(job, source, captured))
        source = formats_chosen(job, source, captured)
        quantized = fake_quantized(job, source, calibrated_weights(job, source, captured))
        exported = exported_graph(job, source, quantized)
        return RangeScan.of(job.recipe.name, len(captured), measured_ranges(job, source, captured, exported))


def print_scan(scan: RangeScan, console: Console, top: int) -> None:
    """Print the `top` largest tensors with bars up to FP16's largest number, and the verdict."""
    title = (
        f"{scan.name}: the {min(top, len(scan.ranges))} largest of {len(scan.ranges)} tensors on {scan.inputs} inputs"
    )
    table = Table(title=title, title_justify="left")
    limit = COMPUTE_TYPES["fp16"].largest
    for heading in ("tensor", "largest", f"to FP16's {limit:g}, by powers of two", "in FP16", "BF16 rounds by"):
        table.add_column(heading, justify="right" if heading in {"largest", "BF16 rounds by"} else "left")
    for one in scan.ranges[:top]:
        style = "red" if one.fp16 in ("infinite", "not finite") else "yellow" if one.fp16 == "tight" else "green"
        largest = "∞ or NaN" if one.amax is None else f"{one.amax:.4g}"
        error = "-" if one.bf16_error is None else f"{one.bf16_error:.2g}"
        table.add_row(one.place, largest, f"[{style}]{bar(one.amax)}[/]", one.fp16, error)
    console.print(table)
    console.print(scan.verdict, markup=False, highlight=False, soft_wrap=True)


def bar(amax: float | None) -> str:
    """A bar whose length is the logarithm of `amax`, full at FP16's largest number; beyond it an arrow."""
    if amax is None or amax > COMPUTE_TYPES["fp16"].largest:
        return "█" * _BAR + "▶"
    return "█" * round(share_of_fp16(amax) * _BAR)


def share_of_fp16(amax: float | None) -> float:
    """How far a magnitude is on the way from `_SMALLEST_SHOWN` to FP16's largest number, by powers of two: 0 to 1."""
    limit = COMPUTE_TYPES["fp16"].largest
    if amax is None or amax > limit:
        return 1.0
    return math.log2(max(amax, _SMALLEST_SHOWN) / _SMALLEST_SHOWN) / math.log2(limit / _SMALLEST_SHOWN)


def _verdict(value: float) -> Verdict:
    fp16 = COMPUTE_TYPES["fp16"]
    if not math.isfinite(value):
        return "not finite"
    if value > fp16.largest:
        return "infinite"
    if value > fp16.largest / HEADROOM:
        return "tight"
    return "loses bits" if 0 < value < fp16.smallest_normal else "fits"
