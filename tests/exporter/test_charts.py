"""Chart geometry: everything lies inside the plot, ticks enclose the values."""

from __future__ import annotations

import math

import pytest

from exporter.charts import Series, line_chart


def series(values: list[float], name: str = "a") -> Series:
    return Series(name, "main", values, [f"{value}" for value in values])


@pytest.mark.parametrize("values", [[20.0, 31.0, 27.5], [100.0, 100.0, 100.0], [-5.0, 3.0, 190.0], [26.2, 26.3, 26.25]])
def test_points_lie_inside_and_upwards(values: list[float]) -> None:
    chart = line_chart(["a", "b", "c"], [series(values)], "x", "y")
    (line,) = chart.lines
    assert all(chart.left <= point.x <= chart.right and chart.top <= point.y <= chart.bottom for point in line.points)
    order = sorted(range(3), key=lambda index: values[index])
    assert [line.points[index].y for index in order] == sorted((point.y for point in line.points), reverse=True)
    assert float(chart.y_ticks[0].label) <= min(values)
    assert float(chart.y_ticks[-1].label) >= max(values)
    assert 2 <= len(chart.y_ticks) <= 9


def test_values_that_are_not_finite_leave_gaps() -> None:
    chart = line_chart(["a", "b", "c"], [series([1.0, math.nan, 3.0]), series([math.nan] * 3, "b")], "x", "y")
    assert [line.name for line in chart.lines] == ["a"]
    assert len(chart.lines[0].points) == 2
    assert line_chart(["a"], [series([math.inf])], "x", "y") is None


def test_many_positions_have_few_labels() -> None:
    labels = [str(index) for index in range(250)]
    chart = line_chart(labels, [series([float(index) for index in range(250)])], "x", "y")
    assert len(chart.x_ticks) <= 20
