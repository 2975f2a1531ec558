"""Sums over inputs: every sample counts once, whatever memory suffices for, and layers with one input share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from exporter.calibration.activations import BatchLimit
from exporter.calibration.balance import Moments
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.input_statistics import InputSums
from exporter.calibration.inputs import CalibrationRun
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.shards import Shard

SAMPLES, TOKENS, WIDTH = 8, 4, 16
Adds = Callable[[Tensor], None]


class _OutOfMemoryOnce(TorchFunctionMode):
    """The operation of this number finds no memory; all others do."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_function__(
        self, func: Callable[..., Any], _types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("pretended")
        return func(*args, **(kwargs or {}))


def _sums() -> InputSums:
    return InputSums(SAMPLES, WIDTH, Shard(), torch.linspace(0.5, 1.5, SAMPLES))


def _statistics() -> tuple[Adds, Callable[[], Sequence[Tensor]]]:
    sums = _sums()

    def found() -> Sequence[Tensor]:
        seen = sums.result()["layer"]
        assert seen.gram is not None
        return seen.mean_square, seen.gram, torch.tensor(seen.amax)

    return lambda x: sums.add("layer", x), found


def _moments() -> tuple[Adds, Callable[[], Sequence[Tensor]]]:
    moments = Moments()
    return moments.add, lambda: (moments.mean, moments.spread(moments.mean))


@pytest.mark.parametrize("make", [_statistics, _moments])
def test_a_sample_counts_once_wherever_memory_ends(
    make: Callable[[], tuple[Adds, Callable[[], Sequence[Tensor]]]],
) -> None:
    x = torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    add, found = make()
    add(x)
    expected, number = found(), 0
    while True:
        number += 1
        add, found = make()
        failing, limit = _OutOfMemoryOnce(number), BatchLimit(SAMPLES * TOKENS)
        with failing:
            limit.each(SAMPLES, TOKENS, lambda part, add=add: add(x[part]))  # type: ignore[misc]
        for one, other in zip(found(), expected, strict=True):
            torch.testing.assert_close(one, other)
        if failing.left > 0:
            break
        assert limit.tokens == SAMPLES * TOKENS // 2
    assert number > 5


def test_layers_with_one_input_share_its_sums_and_others_do_not() -> None:
    sums, x = _sums(), torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    for part in (x[:3], x[3:]):
        for name in ("q", "k", "v"):
            sums.add(name, part)
        sums.add("out", part * 2)
    seen = sums.result()
    assert list(seen) == ["q", "k", "v", "out"]
    assert seen["q"] is seen["k"] is seen["v"]
    gram, other = seen["q"].gram, seen["out"].gram
    assert gram is not None
    assert other is not None
    torch.testing.assert_close(other, gram * 4)


def test_statistics_of_inputs_are_those_of_all_samples(
    model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts
) -> None:
    calibration = CalibrationRun(adapter, captured, prompts)
    name = "transformer_blocks.1.ff.net.2"
    inputs = calibration.layer_inputs(model, name).flatten(0, -2)
    statistics = calibration.input_statistics(model, [name])[name]
    assert statistics.amax == float(inputs.abs().max())
    assert statistics.least == float(inputs.min())
    assert torch.allclose(statistics.mean_square, inputs.square().mean(dim=0), rtol=1e-5)
