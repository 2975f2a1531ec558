"""Gram matrices are made in parts where memory has no room for all, with the same bits, and are gone afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.input_parts import InputParts
from exporter.calibration.input_statistics import InputStatistics
from exporter.calibration.inputs import CalibrationRun
from exporter.method_section import MethodSection
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.plan import Plan
from exporter.progress import NullProgress, Task

FED_BACK = MethodSection(name="gptq", scale_search="absmax")


class _Notes(NullProgress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.fixture
def run(adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts) -> CalibrationRun:
    return CalibrationRun(adapter, captured, prompts)


@pytest.fixture
def plan(plan_for: Callable[..., Plan]) -> Plan:
    return plan_for("transformer_blocks.0", group_size=0, activation="none")


def test_parts_hold_as_many_layers_as_fit_and_one_at_least(model: nn.Module, plan: Plan, run: CalibrationRun) -> None:
    sizes = {layer.name: 4 * layer.in_features**2 for layer in plan.layers}
    assert len(InputParts(model, plan.layers, run, 1 << 20)) == 1
    assert len(InputParts(model, plan.layers, replace(run, memory=0), 0)) == 1
    assert len(InputParts(model, plan.layers, replace(run, memory=0), 1 << 20)) == len(plan.layers)
    memory = max(sizes.values())
    parts = InputParts(model, plan.layers, replace(run, memory=memory), 1 << 20)
    seen = [([layer.name for layer in here], inputs) for here, inputs in parts.of(plan.layers)]
    assert 1 < len(seen) == len(parts) < len(plan.layers)
    assert [name for names, _ in seen for name in names] == [layer.name for layer in plan.layers]
    for names, inputs in seen:
        assert inputs.keys() == set(names)
        assert sum(sizes[name] for name in names) <= memory


def test_in_parts_the_bits_are_the_same_and_it_is_said_so(model: nn.Module, plan: Plan, run: CalibrationRun) -> None:
    whole = calibrate(model, plan, run, FED_BACK, 0, NullProgress())
    progress = _Notes()
    parts = calibrate(model, plan, replace(run, memory=1 << 16), FED_BACK, 0, progress)
    (note,) = progress.notes
    assert "parts, each with a run over all captured inputs, since calibration.memory has no room" in note
    assert [replace(one, seconds=0.0) for one in parts.blocks] == [replace(one, seconds=0.0) for one in whole.blocks]
    for name, weight in whole.weights.items():
        assert torch.equal(weight.codes, parts.weights[name].codes)
        assert torch.equal(weight.scales, parts.weights[name].scales)


class _Watched(CalibrationRun):
    """Knows which of the statistics that it has made are still there."""

    made: ClassVar[list[weakref.ref[InputStatistics]]] = []

    def input_statistics(
        self, model: nn.Module, layers: Iterable[str], largest_gram: int = 0
    ) -> dict[str, InputStatistics]:
        found = super().input_statistics(model, layers, largest_gram)
        self.made.extend(map(weakref.ref, found.values()))
        return found


class _Counting(NullProgress):
    """Counts those that are there whenever a block begins to be learned."""

    def __init__(self) -> None:
        self.left: list[int] = []

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        if title.startswith("calibrate "):
            self.left.append(sum(one() is not None for one in _Watched.made))
        with super().task(title, total) as task:
            yield task


def test_no_gram_matrix_is_left_while_blocks_are_learned(
    model: nn.Module, plan: Plan, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts
) -> None:
    method = MethodSection(scale_search="absmax", start="gptq", iterations=1, batch_size=4)
    progress = _Counting()
    calibrate(model, plan, _Watched(adapter, captured, prompts), method, 0, progress)
    assert len(_Watched.made) == len(plan.layers)
    assert progress.left == [0]


def test_the_order_of_execution_needs_one_sample(model: nn.Module, run: CalibrationRun) -> None:
    names = [
        "proj_out",
        "transformer_blocks.1.attn1.to_q",
        "transformer_blocks.0.ff.net.2",
        "caption_projection.linear_1",
    ]
    ran: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])) if args else ran.append(0))
    try:
        order = run.order(model, names)
    finally:
        handle.remove()
    assert order == [names[3], names[2], names[1], names[0]]
    assert order == list(run.input_statistics(model, names))
    assert len(ran) == 1
