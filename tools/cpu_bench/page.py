"""docs/benchmarks.md and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from exporter.files import atomic_path
from exporter.metrics import installed_versions
from exporter.workdir import program_identity
from tools.cpu_bench.digits import Row
from tools.cpu_bench.graphs import DYNAMIC, FP32, FP32_FUSED, VARIANTS, W4
from tools.cpu_bench.measure import ATTENTION, THREADS, Memory, middle
from tools.cpu_bench.model import BLOCKS
from tools.this_machine import processor

PICTURE = "benchmarks.svg"
_OURS, _OTHERS = "#4c78a8", "#b8b8b8"


@dataclass(frozen=True)
class Result:
    """Everything measured of one graph; `snr_db` is None for FP32 itself."""

    name: str
    seconds: Sequence[float]
    file_bytes: int
    memory: Memory
    snr_db: float | None


@dataclass(frozen=True)
class Page:
    """What the page shows. `profiles` are seconds per kind of operator, `gemm_seconds` integer products alone."""

    blocks: int
    rounds: int
    results: Sequence[Result]
    profiles: Mapping[str, Mapping[str, float]]
    gemm_seconds: float
    digits: Sequence[Row]


@dataclass(frozen=True)
class _Line:
    """One line of the table of results; sizes are shares of FP32's."""

    name: str
    step: float
    fastest: float
    speedup: float
    snr_db: float | None
    file: float
    resident: float
    peak: float
    load: float


@dataclass(frozen=True)
class _Goal:
    """What was aimed at, what came out, and whether that is enough."""

    aim: str
    measured: str
    met: bool


def _goals(page: Page) -> list[_Goal]:
    """The aims of the CPU path, each against this page's own figures."""
    base, dynamic = _named(page, FP32), _named(page, DYNAMIC)
    w4a6, w4a8 = (_named(page, name) for name in W4)
    seconds = {result.name: middle(result.seconds) for result in page.results}
    digits = {row.name: row.mean_db for row in page.digits}
    goals = [
        _at_least(f"{w4a6.name} at least 2.0 × FP32", seconds[FP32] / seconds[w4a6.name], 2.0),
        _at_least(f"{w4a8.name} at least 2.5 × FP32", seconds[FP32] / seconds[w4a8.name], 2.5),
        _at_least(f"{w4a8.name} not slower than {DYNAMIC}", seconds[DYNAMIC] / seconds[w4a8.name], 1.0),
    ]
    for result in (w4a6, w4a8):
        gain = (result.snr_db or 0) - (dynamic.snr_db or 0)
        goals.append(_at_least(f"{result.name} at least 8 dB closer to FP32 than {DYNAMIC}, this model", gain, 8.0))
    for name, decibels in digits.items():
        if name != DYNAMIC:
            gain = decibels - digits[DYNAMIC]
            goals.append(_at_least(f"{name} at least 8 dB closer to FP32 than {DYNAMIC}, digits model", gain, 8.0))
    for result in (w4a6, w4a8):
        share = result.memory.running / base.memory.running
        goals.append(_at_most(f"{result.name} resident at most 0.45 of FP32", share, 0.45))
        goals.append(_at_most(f"{result.name} file at most 0.17 of FP32", result.file_bytes / base.file_bytes, 0.17))
    return goals


def _at_least(aim: str, value: float, limit: float) -> _Goal:
    return _Goal(aim, f"{value:.2f}", value >= limit)


def _at_most(aim: str, value: float, limit: float) -> _Goal:
    return _Goal(aim, f"{value:.3f}", value <= limit)


def markdown(page: Page) -> str:
    """The page's text."""
    environment = jinja2.Environment(  # noqa: S701 - Markdown, no HTML
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined
    )
    base = _named(page, FP32)
    versions = installed_versions()
    totals = {name: sum(kinds.values()) for name, kinds in page.profiles.items()}
    quantized = next(name for name in page.profiles if name in VARIANTS)
    return environment.get_template("benchmarks.md.jinja").render(
        page=page,
        base=base,
        rows=[_line(result, base) for result in page.results],
        command="python -m tools.bench" + (f" --blocks {page.blocks}" if page.blocks != BLOCKS else ""),
        machine=f"{processor()}, {THREADS} cores",
        versions=", ".join(f"{name} {versions[name]}" for name in ("onnxruntime", "onnx", "torch", "numpy")),
        picture=PICTURE,
        threads=THREADS,
        program=program_identity()[:12],
        goals=_goals(page),
        activation_gap=abs((_named(page, W4[1]).snr_db or 0) - (_named(page, W4[0]).snr_db or 0)),
        kinds=list(dict.fromkeys(kind for kinds in page.profiles.values() for kind in kinds)),
        totals=totals,
        quantized=quantized,
        floor=page.gemm_seconds + page.profiles[quantized][ATTENTION],
        digits_base=next(row for row in page.digits if row.name == DYNAMIC),
        fp32=FP32,
        fused=FP32_FUSED,
        dynamic=DYNAMIC,
    )


def _named(page: Page, name: str) -> Result:
    return next(result for result in page.results if result.name == name)


def _line(result: Result, base: Result) -> _Line:
    step = middle(result.seconds)
    return _Line(
        name=result.name,
        step=step,
        fastest=min(result.seconds),
        speedup=middle(base.seconds) / step,
        snr_db=result.snr_db,
        file=result.file_bytes / base.file_bytes,
        resident=result.memory.running / base.memory.running,
        peak=result.memory.peak / base.memory.peak,
        load=result.memory.load_seconds,
    )


def draw(page: Page, path: Path) -> None:
    """One bar per graph: seconds of a step, with the speed-up over FP32."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fp4export"
    from matplotlib import pyplot as plt

    names = [result.name for result in page.results]
    seconds = [middle(result.seconds) for result in page.results]
    base = middle(_named(page, FP32).seconds)
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(names) + 0.9))
    bars = axes.barh(names, seconds, color=[_OURS if name in VARIANTS else _OTHERS for name in names])
    axes.bar_label(bars, [f"{base / value:.2f}×" for value in seconds], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per step (median)")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
