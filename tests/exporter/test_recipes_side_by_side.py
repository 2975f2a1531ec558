"""Recipes that share a work folder: none replaces what another needs, and an unfinished one is refused in time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from exporter.calibration_stages import calibrated_weights, captured_inputs, formats_chosen
from exporter.errors import InputError
from exporter.job import open_job
from exporter.model_stages import balanced, transformed
from exporter.progress import NullProgress, Progress
from exporter.recipe import load_recipe
from exporter.source import load_source
from tests.exporter.progresses import InterruptedProgress, Notes

Calibrate = Callable[..., None]
Times = dict[Path, int]
AUTO, BALANCE = "layers.0.weight=auto", "method.balance=true"
LOW_RANK = (
    'layers=[{match: "*.ff.net.2", group: 32, low_rank: 4, hadamard: 16}, {match: "transformer_blocks.*", group: 32}]'
)


@pytest.fixture
def folder(tiny_job: Path, tmp_path: Path) -> Path:
    """A copy of the recipe's folder, with other prompts beside its own."""
    folder = shutil.copytree(tiny_job, tmp_path / "job")
    prompts = {name: tensor.flip(0).contiguous() for name, tensor in load_file(folder / "prompts.safetensors").items()}
    save_file(prompts, folder / "others.safetensors")
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "x.work"


@pytest.fixture
def calibrate(folder: Path, work: Path) -> Calibrate:
    """The stages up to the calibrated weights, as an export has them."""

    def calibrate(*changes: str, progress: Progress | None = None, fresh: bool = False) -> None:
        words = ("method.name=gptq", "method.scale_search=absmax", *changes)
        recipe, shown = load_recipe(folder / "tiny.yaml", words, "cpu"), progress or NullProgress()
        job = open_job(recipe, work.parent / "x.onnx", work, fresh=fresh, keep_graphs=False, progress=shown)
        source = load_source(job)
        captured = captured_inputs(job, source)
        source = transformed(job, balanced(job, source, captured))
        calibrated_weights(job, formats_chosen(job, source, captured), captured)

    return calibrate


def _times(work: Path) -> Times:
    """When sealed files were made."""
    return {path: path.stat().st_mtime_ns for path in work.rglob("*.seal")}


def _names(times: Times) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in times)


def _before_units(changes: tuple[str, ...]) -> int:
    """Steps of choosing formats and of branches of low rank, between the captured inputs and the 20 layers' scales."""
    return 2 * (AUTO in changes) + 2 * (LOW_RANK in changes)


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ((BALANCE,), ["balance", "calibration", "quantized"]),
        ((AUTO,), ["calibration", "formats", "quantized"]),
        ((LOW_RANK, BALANCE), ["balance", "calibration", "low_rank", "quantized"]),
    ],
)
def test_recipes_of_other_inputs_have_files_of_their_own(
    changes: tuple[str, ...], made: list[str], calibrate: Calibrate, work: Path
) -> None:
    calibrate(*changes)
    kept = _times(work)
    assert _names(kept) == made
    others = "calibration.prompts=others.safetensors", "calibration.seed=1", "model.resolution=5"
    for count, other in enumerate(others, start=2):
        calibrate(*changes, other)
        both = _times(work)
        assert kept.items() < both.items()
        assert _names(both) == sorted(made * count)
        kept = both
    calibrate(*changes)
    assert _times(work) == kept


@pytest.mark.parametrize("changes", [(), (AUTO,), (BALANCE,), (AUTO, BALANCE), (LOW_RANK, BALANCE)])
def test_an_interrupted_calibration_is_in_nobody_s_way_who_has_nothing_to_calibrate(
    changes: tuple[str, ...], calibrate: Calibrate, work: Path
) -> None:
    """As in a sweep, and in a bundle's second target, whose multipliers are others."""
    calibrate(*changes)
    killed = *changes, "preset=w4a8_int", "calibration.prompts=others.safetensors"
    with pytest.raises(KeyboardInterrupt):
        calibrate(*killed, progress=InterruptedProgress(3 + _before_units(changes) + 20))
    kept = _times(work)
    assert len(list(work.glob("unfinished.*/*.seal"))) == 1
    calibrate(*changes)
    assert _times(work) == kept
    for other in ((*changes, "preset=w4a8"), (*changes, "method.start=gptq"), (*killed, "calibration.steps=2")):
        with pytest.raises(InputError, match=r"finished units: 1, had .* to go on with it"):
            calibrate(*other)
        assert _times(work) == kept, "something was made before it was refused"
    calibrate(*killed)
    assert not any(work.glob("unfinished.*"))
    assert len(list(work.glob("quantized.*.safetensors"))) == 2
    calibrate(*changes, "preset=w4a8")
    assert len(list(work.glob("quantized.*.safetensors"))) == 3


def test_units_whose_formats_were_lost_are_found_when_these_are_chosen_again(calibrate: Calibrate, work: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate(AUTO, progress=InterruptedProgress(3 + _before_units((AUTO,)) + 20))
    (formats,) = work.glob("formats.*.json")
    formats.write_text("{")
    notes = Notes()
    calibrate(AUTO, progress=notes)
    assert any("20 layers (gptq), 1 units of an earlier run" in line for line in notes.lines)


def test_formats_that_are_chosen_otherwise_are_told(calibrate: Calibrate, work: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate("layers.0.weight=e3m0", progress=InterruptedProgress(3 + 20))
    captured = next(work.glob("calibration.*.seal")).stat().st_mtime_ns
    with pytest.raises(InputError, match=r"finished units: 1, had .*: weight e3m0, not e\dm\d"):
        calibrate(AUTO)
    assert next(work.glob("calibration.*.seal")).stat().st_mtime_ns == captured


def test_finished_weights_whose_inputs_were_lost_are_refused_over_units_of_the_same(
    calibrate: Calibrate, work: Path
) -> None:
    calibrate()
    with pytest.raises(KeyboardInterrupt):
        calibrate("preset=w4a8_int", progress=InterruptedProgress(20))
    next(work.glob("calibration.*.seal")).unlink()
    kept = _times(work)
    with pytest.raises(InputError, match="finished units: 1, had "):
        calibrate()
    assert _times(work) == kept


def test_who_begins_anew_removes_units_before_what_they_are_made_of(
    calibrate: Calibrate, folder: Path, work: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate(progress=InterruptedProgress(3 + 20))
    assert any(work.glob("unfinished.*"))
    with pytest.raises(KeyboardInterrupt):
        calibrate("preset=w4a8_int", progress=InterruptedProgress(1), fresh=True)
    assert not any(work.glob("unfinished.*"))


@pytest.mark.parametrize("changes", [(), (AUTO,), (BALANCE,), (AUTO, BALANCE)])
def test_files_of_another_program_are_left_until_it_is_said_whose_units_they_are(
    changes: tuple[str, ...], calibrate: Calibrate, work: Path
) -> None:
    """Names say nothing of the program: capturing would replace what the earlier one's units are made of."""
    calibrate(*changes)
    with pytest.raises(KeyboardInterrupt):
        calibrate(*changes, "preset=w4a8_int", progress=InterruptedProgress(_before_units(changes) + 20))
    for seal in work.glob("*.seal"):
        seal.write_text(json.dumps(json.loads(seal.read_text()) | {"key": "of an earlier program"}))
    (unfinished,) = work.glob("unfinished.*")
    settings = unfinished / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"program": "earlier"}))
    unfinished.rename(work / "unfinished.00000000")
    kept = _times(work)
    for preset in ("preset=w4a6", "preset=w4a8_int"):
        with pytest.raises(InputError, match=r"finished units: 1, had another version of fp4export .*--fresh"):
            calibrate(*changes, preset)
        assert _times(work) == kept


def test_models_in_one_work_folder_keep_their_weights(calibrate: Calibrate, folder: Path, work: Path) -> None:
    calibrate()
    kept = _times(work)
    weights = next(folder.rglob("transformer/*.safetensors"))
    first = load_file(weights)
    save_file({name: tensor * 2 for name, tensor in first.items()}, weights)
    with pytest.raises(KeyboardInterrupt):
        calibrate(progress=InterruptedProgress(3 + 20))
    save_file({name: tensor * 3 for name, tensor in first.items()}, weights)
    with pytest.raises(InputError, match=r"finished units: 1, had another content of .*\.safetensors"):
        calibrate()
    save_file({name: tensor * 2 for name, tensor in first.items()}, weights)
    calibrate()
    assert kept.items() < _times(work).items()
    assert _names(_times(work)) == ["calibration", "calibration", "quantized", "quantized"]
