"""A calibration that was interrupted goes on behind its last finished unit, and ends as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.finished import UnitFiles
from exporter.calibration.inputs import CalibrationRun
from exporter.errors import InputError
from exporter.method_section import MethodSection
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.plan import Plan
from exporter.progress import NullProgress
from exporter.quantize import CalibrationResult, save_quantized
from exporter.workdir import WorkDir
from tests.exporter.progresses import InterruptedProgress

METHODS = {
    "fp4dit": MethodSection(scale_search="absmax", iterations=4, batch_size=4),
    "gptq": MethodSection(name="gptq", scale_search="absmax"),
}
SETTINGS = {"files": {"weights.safetensors": "00ff"}, "method": {"iterations": 4, "name": "fp4dit"}}

Resume = Callable[..., CalibrationResult]
Planner = Callable[..., Plan]


@pytest.fixture
def plan(plan_for: Planner) -> Plan:
    """Twenty-two layers, one of them before the blocks and one behind them."""
    return plan_for("caption_projection.linear_1", "transformer_blocks", "proj_out", group_size=0)


@pytest.fixture
def resume(
    model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts, plan: Plan, tmp_path: Path
) -> Resume:
    """Calibrate in the same work folder."""

    def resumed(method: str, progress: NullProgress, *, fresh: bool = False) -> CalibrationResult:
        units = UnitFiles(WorkDir.open(tmp_path / "w"), plan, SETTINGS)
        if fresh:
            units.remove_all()
        units.begin()
        return calibrate(model, plan, CalibrationRun(adapter, captured, prompts), METHODS[method], 0, progress, units)

    return resumed


def _bytes(result: CalibrationResult, plan: Plan, path: Path) -> bytes:
    save_quantized(path, result, plan)
    return path.read_bytes()


def _units(folder: Path) -> dict[str, int]:
    """The finished units' files, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("w/unfinished.*/*.safetensors")}


# Scales of 22 layers are a unit, and so is their error feedback; "fp4dit" learns four units of four iterations.
@pytest.mark.parametrize(
    ("method", "moments"),
    [("fp4dit", {5: 0, 24: 1, 28: 2, 37: 4}), ("gptq", {20: 0, 40: 1})],
)
def test_interrupted_at_any_step_it_goes_on_behind_the_last_unit_and_ends_with_the_same_bytes(
    method: str, moments: dict[int, int], resume: Resume, plan: Plan, tmp_path: Path
) -> None:
    expected = _bytes(resume(method, NullProgress(), fresh=True), plan, tmp_path / "expected")
    for steps, finished in moments.items():
        with pytest.raises(KeyboardInterrupt):
            resume(method, InterruptedProgress(steps), fresh=True)
        kept = _units(tmp_path)
        assert len(kept) == finished
        assert _bytes(resume(method, NullProgress()), plan, tmp_path / "resumed") == expected
        assert kept.items() <= _units(tmp_path).items()


@pytest.mark.parametrize("damage", ["content", "seal"])
def test_of_a_damaged_unit_only_that_unit_is_done_again(
    damage: str, resume: Resume, plan: Plan, tmp_path: Path
) -> None:
    expected = _bytes(resume("fp4dit", NullProgress()), plan, tmp_path / "expected")
    (file,) = tmp_path.glob("w/unfinished.*/*.transformer_blocks.0.safetensors")
    if damage == "content":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.with_name(f"{file.name}.seal").write_text("{")
    rest = InterruptedProgress()
    assert _bytes(resume("fp4dit", rest), plan, tmp_path / "resumed") == expected
    assert [title for title in rest.begun if title != "scales"] == ["calibrate transformer_blocks.0"]


def test_a_unit_counts_only_behind_the_units_that_it_was_made_after(resume: Resume, plan: Plan, tmp_path: Path) -> None:
    result = resume("fp4dit", NullProgress())
    units = UnitFiles(WorkDir(tmp_path / "w"), plan, SETTINGS)
    assert units.find("scales", plan.layers) is not None
    first = plan.layers[:1]
    weight = result.weights[first[0].name]
    other = replace(weight, scales=weight.scales * 2)
    units.keep(first[0].name, first, CalibrationResult({first[0].name: other}, result.blocks[:1]))
    blocks = [layer for layer in plan.layers if layer.name.startswith("transformer_blocks.0.")]
    assert units.find("transformer_blocks.0", blocks) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": {"iterations": 5, "name": "fp4dit"}}, "had method.iterations 4, not 5: "),
        ({"method": {"iterations": 4, "name": "fp4dit", "start": "gptq"}}, "had method.start none, not gptq: "),
        ({"method": {"iterations": 4, "name": "fp4dit", "compute": "bf16"}}, "had method.compute none, not bf16: "),
        ({"method": {"iterations": 4}}, "had method.name fp4dit, not none: "),
        ({"files": {"weights.safetensors": "ff00"}}, "had another content of weights.safetensors: "),
    ],
)
def test_other_settings_are_refused_while_they_would_lose_units(
    change: dict[str, Any], words: str, plan: Plan, resume: Resume, tmp_path: Path
) -> None:
    def units() -> UnitFiles:
        return UnitFiles(WorkDir.open(tmp_path / "w"), plan, SETTINGS | change)

    units().refuse_others()
    with pytest.raises(KeyboardInterrupt):
        resume("fp4dit", InterruptedProgress(22))
    assert len(_units(tmp_path)) == 1
    with pytest.raises(InputError, match=words) as caught:
        units().refuse_others()
    for part in ("finished units: 1,", "--work-dir", "--fresh"):
        assert part in str(caught.value)
    UnitFiles(WorkDir(tmp_path / "w"), plan, SETTINGS).refuse_others()
    units().remove_all()
    assert _units(tmp_path) == {}
    units().refuse_others()


@pytest.fixture
def theirs(plan: Plan, resume: Resume, tmp_path: Path) -> Path:
    """The settings of units that are not this recipe's, though every word is equal."""
    resume("gptq", NullProgress())
    (folder,) = tmp_path.glob("w/unfinished.*")
    return folder.rename(folder.with_name("unfinished.00000000")) / "settings.json"


def test_another_version_of_the_program_is_named(plan: Plan, theirs: Path, tmp_path: Path) -> None:
    theirs.write_text(json.dumps(json.loads(theirs.read_text()) | {"program": "older"}))
    with pytest.raises(InputError, match="had another version of fp4export or of its libraries: "):
        UnitFiles(WorkDir(tmp_path / "w"), plan, SETTINGS).refuse_others()


@pytest.mark.parametrize("content", ["{", "[]", '{"layers": [1]}', '{"layers": [{}]}', None])
def test_units_whose_settings_are_damaged_are_refused_to_other_recipes(
    content: str | None, plan: Plan, theirs: Path, tmp_path: Path
) -> None:
    theirs.unlink()
    if content is not None:
        theirs.write_text(content)
    with pytest.raises(InputError, match=r"unfinished\.00000000: .* its damaged settings\.json .*--fresh"):
        UnitFiles(WorkDir(tmp_path / "w"), plan, SETTINGS).refuse_others()


def test_damaged_settings_stop_nobody_from_going_on(resume: Resume, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        resume("fp4dit", InterruptedProgress(22))
    (file,) = tmp_path.glob("w/unfinished.*/settings.json")
    content = file.read_text()
    file.write_text("{")
    kept = _units(tmp_path)
    UnitFiles(WorkDir(tmp_path / "w"), plan, SETTINGS).refuse_others()
    resume("fp4dit", NullProgress())
    assert len(kept) == 1
    assert kept.items() < _units(tmp_path).items()
    assert file.read_text() == content


def test_whose_units_are_there_goes_on_whatever_else_is(
    plan: Plan, theirs: Path, resume: Resume, tmp_path: Path
) -> None:
    resume("gptq", NullProgress())
    assert theirs.is_file()
    UnitFiles(WorkDir(tmp_path / "w"), plan, SETTINGS).refuse_others()


def test_a_folder_without_units_is_no_loss(plan: Plan, tmp_path: Path) -> None:
    work = WorkDir.open(tmp_path / "w")
    UnitFiles(work, plan, SETTINGS).begin()
    other = UnitFiles(work, plan, SETTINGS | {"seed": 1})
    other.refuse_others()
    other.begin()
    (left,) = work.path.iterdir()
    assert json.loads((left / "settings.json").read_text())["seed"] == 1


def test_statistics_of_finished_units_are_kept(resume: Resume) -> None:
    first, again = (resume("fp4dit", NullProgress()) for _ in range(2))
    assert [asdict(replace(block, seconds=0.0)) for block in first.blocks] == [asdict(block) for block in again.blocks]
