"""What a calibration has finished so far, kept in the work folder until all of it is done.

A calibration takes hours and is made of units: the scales of some layers, the roundings of a block. As soon as one is
finished it is a sealed file of quantized weights, so that a run that was killed goes on behind the last one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from exporter.errors import InputError
from exporter.files import write_text_atomically
from exporter.onnx_files import checksum_of
from exporter.plan import LayerPlan, Plan
from exporter.quantize import CalibrationResult, load_quantized, save_quantized
from exporter.shards import Shard
from exporter.workdir import WorkDir, key_of, program_identity

_SETTINGS = "settings.json"
_PROGRAM = "program"
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
    """Units as sealed files in `folder` of the work folder, of a calibration of `plan` with these `settings`.

    `settings` are JSON values by name: all that the calibration depends on; `made_of` are the checksums of the files
    that it reads. A file counts if its checksum holds, and those files and the units before it are still those that it
    was made of; else its unit is done again. Of several processes, which
    share the folder, the first one writes, and all go through the units together.
    """

    def __init__(
        self,
        work: WorkDir,
        folder: str,
        plan: Plan,
        settings: Mapping[str, Any],
        shard: Shard | None = None,
        made_of: Sequence[str] = (),
    ) -> None:
        self._work, self._plan, self._shard = work, plan, shard or Shard()
        self._folder = work.file(folder)
        self._settings = {_PROGRAM: program_identity(), **settings}
        self._made_of, self._before = list(made_of), list[str]()
        self.found = 0

    def refuse_others(self) -> None:
        """Raise `InputError`, naming the first difference, if the folder holds units made with other settings."""
        finished = len(list(self._folder.glob(_SEAL)))
        if self._work.fresh or not finished:
            return
        try:
            earlier = json.loads((self._folder / _SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # Then the units' own seals decide.
            return
        difference = _difference(earlier, json.loads(json.dumps(self._settings)))
        if difference:
            raise InputError(
                f"{self._folder}: an interrupted calibration, finished units: {finished}, had {difference}: change "
                "that back to go on with it, --fresh to throw it away, or --work-dir to begin another one elsewhere"
            )

    def begin(self) -> None:
        """Make the folder ready: empty for a run that starts anew."""
        if self._work.fresh:
            self.remove()
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


def _difference(earlier: object, now: object) -> str | None:
    """The first difference in words; None where there is none."""
    old, new = dict(_flat(earlier)), dict(_flat(now))
    for name in [*new, *(name for name in old if name not in new)]:
        if old.get(name) == new.get(name):
            continue
        if name == _PROGRAM:
            return "another version of fp4export or of its libraries"
        if name.startswith("model."):
            return f"another content of {name.removeprefix('model.')}"
        return f"{name} {_text(old.get(name))}, not {_text(new.get(name))}"
    return None


def _text(value: object) -> str:
    return "none" if value is None else json.dumps(value).strip('"')


def _flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name → value of everything that is not a mapping."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else key)
