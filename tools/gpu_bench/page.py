"""The GPU's section of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tools.cpu_bench.model import BLOCKS
from tools.marked_section import markdown_table

_MANY_TOKENS = 2048


@dataclass(frozen=True)
class LinearRow:
    """Milliseconds at one shape; `missing` says why a library's product did not run."""

    scheme: str
    rows: int
    n: int
    k: int
    container: str
    best_tactic: int
    default_tactic: int
    default_ms: float
    gemm_ms: float
    with_quantizer_ms: float
    bf16_ms: float
    library_ms: Mapping[str, float]
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizerRow:
    """Milliseconds of the quantizers by their best tactics, and the share of the copy bandwidth that the plain one
    reaches."""

    format: str
    rows: int
    k: int
    best_tactics: tuple[str, str]
    quantize_ms: float
    of_copy_bandwidth: float
    fused_ms: float
    norm_ms: float


@dataclass(frozen=True)
class StepRow:
    """One step of the whole transformer, as a captured graph and launched from Python; gigabytes of the loaded model
    and the peak of a step."""

    name: str
    milliseconds: float
    launched_ms: float
    loaded_gb: float
    peak_gb: float
    snr_db: float | None


@dataclass(frozen=True)
class Results:
    """Everything that was measured. `machine` is GPU, driver and versions in a line; `least_ms` is what a graph of one
    kernel takes that sets a number to zero. `blocks` are the transformer's. An empty part was not run."""

    command: str
    machine: str
    rounds: int
    least_ms: float
    linears: Sequence[LinearRow] = ()
    quantizers: Sequence[QuantizerRow] = ()
    steps: Sequence[StepRow] = ()
    blocks: int = BLOCKS


@dataclass(frozen=True)
class Aim:
    """What is aimed at: the figure of every row that it speaks of against a limit, the worst row deciding."""

    text: str
    limit: float
    at_least: bool
    figures: Callable[[Results], list[float]]

    def line(self, results: Results) -> str:
        """A line of the table: worst and median figure, and met, missed or not run."""
        figures = self.figures(results)
        if not figures:
            return f"| {self.text} | – | not run |"
        worst = min(figures) if self.at_least else max(figures)
        met = worst >= self.limit if self.at_least else worst <= self.limit
        measured = f"{worst:.2f} (median {statistics.median(figures):.2f}, {len(figures)} shapes)"
        return f"| {self.text} | {measured} | {'met' if met else '**missed**'} |"


def _many(results: Results) -> list[LinearRow]:
    return [row for row in results.linears if row.rows >= _MANY_TOKENS]


AIMS = (
    Aim("GEMM at least 1.6 × BF16", 1.6, True, lambda r: [row.bf16_ms / row.gemm_ms for row in _many(r)]),
    Aim(
        "GEMM at least 0.85 × the better 8-bit library GEMM",
        0.85,
        True,
        lambda r: [min(row.library_ms.values()) / row.gemm_ms for row in _many(r) if row.library_ms],
    ),
    Aim(
        "with quantization at least 1.3 × BF16", 1.3, True,
        lambda r: [row.bf16_ms / row.with_quantizer_ms for row in _many(r)],
    ),
    Aim(
        "quantizer at least 0.80 of the measured copy bandwidth", 0.8, True,
        lambda r: [row.of_copy_bandwidth for row in r.quantizers],
    ),
    Aim(
        "LayerNorm, modulation and quantizer at most 1.15 × LayerNorm alone", 1.15, False,
        lambda r: [row.fused_ms / row.norm_ms for row in r.quantizers],
    ),
    Aim(
        "up to 16 tokens, GEMM at least 2.5 × BF16", 2.5, True,
        lambda r: [row.bf16_ms / row.gemm_ms for row in r.linears if row.rows <= 16],
    ),
)  # fmt: skip


def section(results: Results) -> str:
    """The section's text."""
    parts = [
        "## GPU",
        f"Written by `{results.command}`. {results.machine}. Medians of {results.rounds} rounds, L2 overwritten before "
        "each; random data; CUDA events around captured graphs. Kernels are compiled from the descriptions that "
        "TensorRT's are, and launched by the driver with the same parameters; each tactic was checked against the "
        f"reference in this run. A graph of one kernel that does next to nothing takes {_ms(results.least_ms)} ms. "
        "Tactics are numbered as the program that measured had them.",
        "### What was aimed at",
        markdown_table(("aim", "worst", ""), ()) + "\n" + "\n".join(aim.line(results) for aim in AIMS),
    ]
    if results.linears:
        parts += ["### Linears, milliseconds", _linears(results.linears), *_missing(results.linears)]
    if results.quantizers:
        parts += ["### Quantizers", _quantizers(results.quantizers)]
    if results.steps:
        blocks = f"{results.blocks} of {BLOCKS} blocks"
        parts += [f"### PixArt-α's transformer in torch, {blocks}, a step of 2 × 1024 tokens", _steps(results.steps)]
    return "\n\n".join(parts)


def _linears(rows: Iterable[LinearRow]) -> str:
    names = ("FP8", "INT8")
    head = (
        "format", "tokens", "N × K", "BF16", *(f"library {name}" for name in names), "ours, GEMM", "best tactic",
        "default tactic", "ours with quantizer",
    )  # fmt: skip
    lines = []
    for row in rows:
        libraries = [_ms(row.library_ms[name]) if name in row.library_ms else "–" for name in names]
        lines.append(
            (
                f"{row.scheme} in {row.container}",
                str(row.rows),
                f"{row.n} × {row.k}",
                _ms(row.bf16_ms),
                *libraries,
                _ms(row.gemm_ms),
                f"t{row.best_tactic}",
                f"t{row.default_tactic}: {_ms(row.default_ms)}",
                _ms(row.with_quantizer_ms),
            )
        )
    return markdown_table(head, lines)


def _missing(rows: Iterable[LinearRow]) -> list[str]:
    reasons = sorted({f"library {name}: {reason}" for row in rows for name, reason in row.missing.items()})
    return ["Not run: " + "; ".join(reasons) + "."] if reasons else []


def _quantizers(rows: Iterable[QuantizerRow]) -> str:
    head = ("format", "tokens", "K", "quantizer", "of copy bandwidth", "LayerNorm", "LayerNorm and quantizer", "best")
    lines = [
        (
            row.format, str(row.rows), str(row.k), _ms(row.quantize_ms), f"{row.of_copy_bandwidth:.0%}",
            _ms(row.norm_ms), _ms(row.fused_ms), ", ".join(row.best_tactics),
        )
        for row in rows
    ]  # fmt: skip
    return markdown_table(head, lines)


def _steps(rows: Sequence[StepRow]) -> str:
    base = rows[0].milliseconds
    head = (
        "",
        "step, captured",
        f"× {rows[0].name}",
        "step, launched from Python",
        "model in memory",
        "peak of a step",
        "SNR",
    )
    lines = [
        (
            row.name, f"{row.milliseconds:.2f} ms", f"{base / row.milliseconds:.2f}", f"{row.launched_ms:.2f} ms",
            f"{row.loaded_gb:.2f} GB", f"{row.peak_gb:.2f} GB", "–" if row.snr_db is None else f"{row.snr_db:.1f} dB",
        )
        for row in rows
    ]  # fmt: skip
    return markdown_table(head, lines)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.4f}"
