"""Line charts as SVG geometry; colours come from the page's style, so they follow its light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 720, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 14, 40
_STEPS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
_MOST_TICKS = 7


@dataclass(frozen=True)
class Tick:
    """A label and its place along the axis."""

    position: float
    label: str


@dataclass(frozen=True)
class Point:
    """A place on the chart and the text that hovering shows."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """One series: its name, CSS class and points."""

    name: str
    style: str
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """SVG path data."""
        return "M" + " L".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


@dataclass(frozen=True)
class Chart:
    """A whole chart in pixels of `width` × `height`; the plot area lies between left/right and top/bottom."""

    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_label: str
    y_label: str
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = _HEIGHT - _BOTTOM


@dataclass(frozen=True)
class Series:
    """Values over the common x positions; NaN leaves a point out. `texts` are what hovering shows."""

    name: str
    style: str
    values: Sequence[float]
    texts: Sequence[str]


def line_chart(labels: Sequence[str], series: Sequence[Series], x_label: str, y_label: str) -> Chart | None:
    """A chart of `series` at evenly spaced positions called `labels`; None when no value is finite."""
    finite = [value for one in series for value in one.values if math.isfinite(value)]
    if not finite:
        return None
    ticks = _nice_ticks(min(finite), max(finite))
    low, high = ticks[0], ticks[-1]
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x_of(index: int) -> float:
        return _LEFT + (right - _LEFT) * (index + 0.5) / len(labels)

    def y_of(value: float) -> float:
        return bottom - (bottom - _TOP) * (value - low) / (high - low)

    lines = [
        Line(
            one.name,
            one.style,
            tuple(
                Point(x_of(index), y_of(value), one.texts[index])
                for index, value in enumerate(one.values)
                if math.isfinite(value)
            ),
        )
        for one in series
    ]
    every = -(-len(labels) // 20)
    return Chart(
        lines=tuple(line for line in lines if line.points),
        x_ticks=tuple(Tick(x_of(index), label) for index, label in enumerate(labels) if index % every == 0),
        y_ticks=tuple(Tick(y_of(value), f"{value:g}") for value in ticks),
        x_label=x_label,
        y_label=y_label,
    )


def _nice_ticks(lowest: float, highest: float) -> list[float]:
    """Round numbers that enclose the range, at most a handful."""
    step = next((step for step in _STEPS if (highest - lowest) / step <= _MOST_TICKS - 2), _STEPS[-1])
    first, last = math.floor(lowest / step), math.ceil(highest / step)
    last = max(last, first + 1)
    return [index * step for index in range(first, last + 1)]
