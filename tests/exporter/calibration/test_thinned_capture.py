"""`calibration.every`: which steps are captured, what counts them, and what is as it was without."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

from exporter import load_recipe
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.placement import Placement
from exporter.calibration.step_weights import trajectory_weights
from exporter.calibration_stages import captured_inputs
from exporter.errors import InputError
from exporter.evaluate import held_out_inputs
from exporter.job import open_job
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.progress import NullProgress
from exporter.recipe import CalibrationSection
from exporter.sampling import make_scheduler
from exporter.source import load_source
from tests.exporter.calibration.conftest import TRAJECTORIES, capture

STEPS = 8


def _section(**changes: object) -> CalibrationSection:
    return CalibrationSection.model_validate({"prompts": "p.safetensors", "steps": STEPS, "guidance": 2.0, **changes})


@pytest.mark.parametrize(
    ("steps", "every", "kept"),
    [
        (8, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 3, [1, 4, 7]),
        (9, 3, [2, 5, 8]),
        (8, 8, [7]),
        (1, 1, [0]),
        (50, 4, list(range(1, 50, 4))),
    ],
)
def test_kept_steps_are_counted_back_from_the_last(steps: int, every: int, kept: list[int]) -> None:
    section = _section(steps=steps, every=every, samples=5)
    assert list(section.kept_steps) == kept
    assert section.inputs == 5 * 2 * len(kept)
    assert _section(steps=steps, every=every, samples=5, guidance=1.0).inputs == 5 * len(kept)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_thinned_set_is_the_rows_of_the_whole_one(
    model: nn.Module, adapter: PixArtAdapter, prompts: Prompts, guidance: float
) -> None:
    whole, thinned = (
        capture(model, adapter, prompts, _section(every=every, guidance=guidance), Placement()) for every in (1, 3)
    )
    rows = torch.nonzero(torch.isin(whole.step_index, torch.tensor([1, 4, 7]))).flatten()
    for field in fields(CalibrationSet):
        assert torch.equal(getattr(thinned, field.name), getattr(whole.at(rows), field.name)), field.name
    assert len(thinned) == _section(every=3, guidance=guidance, samples=TRAJECTORIES).inputs


def test_steps_keep_their_weights_beside_each_other(model: nn.Module, adapter: PixArtAdapter, prompts: Prompts) -> None:
    settings = _section(every=3)
    scheduler = make_scheduler(settings.scheduler, None, STEPS)
    whole, thinned = (
        trajectory_weights(capture(model, adapter, prompts, section, Placement()), scheduler, settings.guidance)
        for section in (settings.whole, settings)
    )
    kept = whole.view(STEPS, -1)[list(settings.kept_steps)].flatten()
    torch.testing.assert_close(thinned, kept / kept.mean())


def test_nothing_is_named_otherwise_where_every_step_is_captured() -> None:
    plain, spelled_out, thinned = _section(), _section(every=1), _section(every=3)
    assert "every" not in plain.captured.keys() | plain.sampler.keys()
    assert (plain.captured, plain.sampler) == (spelled_out.captured, spelled_out.sampler)
    assert thinned.captured == {**plain.captured, "every": 3}
    assert thinned.sampler == {**plain.sampler, "every": 3}
    assert thinned.whole.sampler == plain.sampler


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("calibration.every=0", "must be at least 1, got 0"),
        ("calibration.every=2.5", "expected a whole number, got 2.5"),
        ("calibration.every=null", "expected a whole number, got nothing"),
        ("calibration.every=21", "every 21 is above steps 20"),
    ],
)
def test_a_wrong_value_is_refused(change: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^--set {change}: calibration.*{message}"):
        load_recipe("digits", [change])


def test_calibration_sees_the_kept_steps_and_what_is_held_out_all(tiny_job: Path, tmp_path: Path) -> None:
    """The recipe has 3 steps and 2 trajectories."""
    plain, thinned = (
        open_job(
            load_recipe(tiny_job / "tiny.yaml", changes, "cpu"),
            tmp_path / "x.onnx",
            None,
            fresh=False,
            keep_graphs=False,
            progress=NullProgress(),
        )
        for changes in ((), ("calibration.every=2",))
    )
    source = load_source(plain)
    held_out, captured = held_out_inputs(plain, source), captured_inputs(plain, source)
    file = plain.work.file("held_out.safetensors")
    made = file.stat().st_mtime_ns
    assert len(held_out_inputs(thinned, source)) == len(held_out)
    assert file.stat().st_mtime_ns == made, "it was made anew"
    seen = captured_inputs(thinned, source)
    assert set(seen.step_index.tolist()) == {0, 2}
    assert len(seen) == thinned.recipe.calibration.inputs == len(captured) * 2 // 3
    assert len(list(plain.work.path.glob("calibration.*.safetensors"))) == 2, "kept under one name"
