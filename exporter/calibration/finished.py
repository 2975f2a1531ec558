"""What a calibration has finished so far, kept in the work folder until all of it is done.

A calibration takes hours and is made of units: the scales of some layers, the roundings of a block. As soon as one is
finished it is a sealed file of quantized weights, so that a run that was killed goes on behind the last one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from exporter.calibration.differences import PROGRAM, differences
from exporter.errors import InputError
from exporter.files import write_text_atomically
from exporter.onnx_files import checksum_of
from exporter.plan import LayerPlan, Plan
from exporter.quantize import CalibrationResult, load_quantized, save_quantized
from exporter.shards import Shard
from exporter.workdir import UNFINISHED, WorkDir, key_of, name_for, program_identity

_SETTINGS = "settings.json"
_SEAL = "*.seal"


class FinishedUnits(Protocol):
    """Where a calibration looks for what an earlier run has finished, unit by unit and always in the same order."""

    def find(self, unit: str, layers: Sequence[LayerPlan]) -> CalibrationResult | None:
        """The weights of `layers` as the unit left them, with its statistics; None if it is still to be done."""

    def keep(self, unit: str, layers: Sequence[LayerPlan], result: CalibrationResult) -> CalibrationResult:
        """Note that the unit, which `find` has just not found, is finished; what the first process gives counts."""


class NothingKept:
    """For calibrations without a work folder: every unit is to be done."""

    def find(self, _unit: str, _layers: Sequence[LayerPlan]) -> CalibrationResult | None:
        """Find nothing."""
        return None

    def keep(self, _unit: str, _layers: Sequence[LayerPlan], result: CalibrationResult) -> CalibrationResult:
        """Keep nothing."""
        return result


class UnitFiles:
    """Units as sealed files in a folder of the work folder, of a calibration of `plan` with these `settings`.

    `settings` are JSON values by name: all that the calibration depends on; with the program they name the folder, so
    that every other folder is of another recipe. `made_of` are the checksums of the files that it reads. A file counts
    if its checksum holds, and those files and the units before it are still those that it was made of; else its unit is
    done again. Of several processes, which share the folder, the first one writes, and all go through the units
    together.
    """

    def __init__(
        self,
        work: WorkDir,
        plan: Plan,
        settings: Mapping[str, Any],
        shard: Shard | None = None,
        made_of: Sequence[str] = (),
    ) -> None:
        self._work, self._plan, self._shard = work, plan, shard or Shard()
        self._settings = {PROGRAM: program_identity(), **settings}
        self._folder = work.file(name_for(UNFINISHED, "", self._settings))
        self._made_of, self._before = list(made_of), list[str]()
        self.found = 0

    def refuse_others(self) -> None:
        """Raise `InputError`, naming the differences, while the work folder holds units of another recipe, and none of
        this one: it would begin anew, and the other one's hours be forgotten."""
        for folder in () if _finished(self._folder) else self.others():
            told = self._told_from(folder)
            if told is not None:
                raise InputError(
                    f"{folder}: an interrupted calibration, finished units: {_finished(folder)}, {told} to go on with "
                    "it, or export with --work-dir to begin another one elsewhere, or with --fresh to throw it away"
                )

    def others(self) -> list[Path]:
        """Folders of other recipes that hold finished units."""
        return [folder for folder in self._other_folders() if _finished(folder)]

    def _other_folders(self) -> list[Path]:
        folders = sorted(self._work.path.glob(f"{UNFINISHED}.*"))
        return [folder for folder in folders if folder.is_dir() and folder != self._folder]

    def _told_from(self, folder: Path) -> str | None:
        """None where it may be this recipe's, which has yet to choose formats."""
        try:
            earlier = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            told = differences(earlier, json.loads(json.dumps(self._settings)))
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return f"is of another recipe, which its damaged {_SETTINGS} does not tell: run the command that began it"
        if told:
            return f"had {told}: change that back"
        # Differences without a word of a recipe, such as the layers' order.
        return None if self._plan.open else "is of another recipe: run the command that began it"

    def begin(self) -> None:
        """Make the folder ready, and remove others that hold no units."""
        for folder in self._other_folders():
            if not _finished(folder):
                shutil.rmtree(folder)
        self._folder.mkdir(exist_ok=True)
        write_text_atomically(self._folder / _SETTINGS, json.dumps(self._settings, indent=1) + "\n")

    def find(self, unit: str, layers: Sequence[LayerPlan]) -> CalibrationResult | None:
        """The unit's file, if it was finished by an earlier run."""
        path = self._path(unit)
        if not self._shard.agree(self._shard.is_first and self._work.is_current(path, self._key(unit, layers))):
            return None
        self._before.append(checksum_of(path))
        self.found += 1
        return load_quantized(path, self._part(layers))

    def keep(self, unit: str, layers: Sequence[LayerPlan], result: CalibrationResult) -> CalibrationResult:
        """Write the unit's file and seal it."""
        path = self._path(unit)
        if self._shard.is_first:
            save_quantized(path, result, self._part(layers))
            self._work.seal(path, self._key(unit, layers))
        self._shard.wait()
        self._before.append(checksum_of(path))
        return result if self._shard.is_first else load_quantized(path, self._part(layers))

    def _part(self, layers: Sequence[LayerPlan]) -> Plan:
        return replace(self._plan, layers=tuple(layers))

    def remove(self) -> None:
        """Remove all of them, when they are not needed any more."""
        if self._folder.is_dir():
            shutil.rmtree(self._folder)

    def remove_all(self) -> None:
        """Remove other recipes' as well: for a run that starts anew, whose files those may not be made of."""
        for folder in self._other_folders():
            shutil.rmtree(folder)
        self.remove()

    def _path(self, unit: str) -> Path:
        return self._folder / f"{len(self._before):03d}.{unit}.safetensors"

    def _key(self, unit: str, layers: Sequence[LayerPlan]) -> str:
        names = [layer.name for layer in layers]
        return key_of(
            stage="unit",
            settings=self._settings,
            made_of=self._made_of,
            unit=unit,
            layers=names,
            before=self._before,
        )


def _finished(folder: Path) -> int:
    """How many units."""
    return len(list(folder.glob(_SEAL)))
