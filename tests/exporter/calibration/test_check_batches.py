"""Samples that processes cannot share are refused, by each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.inputs import CalibrationRun
from exporter.errors import InputError
from exporter.method_section import MethodSection
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.plan import Plan
from exporter.progress import NullProgress
from exporter.shards import Shard

RTN = MethodSection(name="rtn", scale_search="mse")
LEARNED = MethodSection(scale_search="mse", iterations=60)

Planner = Callable[..., Plan]


def test_batches_that_cannot_be_shared_out_are_refused(
    model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts, plan_for: Planner
) -> None:
    for (batch_size, world), words in {
        (5, 2): "5 samples cannot be shared out among 2 processes; nearest: 6",
        (30, 2): "only 24",
        (10, 5): "24 captured inputs cannot be shared out evenly among 5 processes",
    }.items():
        method = LEARNED.model_copy(update={"batch_size": batch_size})
        run = CalibrationRun(adapter, captured, prompts, shard=Shard(0, world))
        with pytest.raises(InputError, match=words):
            calibrate(model, plan_for(), run, method, 0, NullProgress())


def test_more_processes_than_inputs_are_refused_by_each(
    model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts, plan_for: Planner
) -> None:
    for shard in (Shard(0, 1000), Shard(999, 1000)):
        with pytest.raises(InputError, match=r"calibration\.samples: 1000 processes have only "):
            calibrate(
                model, plan_for(), CalibrationRun(adapter, captured, prompts, shard=shard), RTN, 0, NullProgress()
            )
