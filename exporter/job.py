"""One run of the main job: what was asked for, where it writes, and how long its stages took."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from exporter.compute import check_compute
from exporter.device.requirements import missing_builder
from exporter.errors import InputError
from exporter.memory import release_mapped_weights, return_freed_memory
from exporter.progress import Progress
from exporter.recipe import Recipe
from exporter.shards import Shard
from exporter.targets import Target, TargetChoice, resolve_target
from exporter.workdir import WorkDir

STAGE_BEGINS, STAGE_ENDS = "stage %s begins", "stage %s ends"
"""Messages of this module's logger, by which a tool can tell what is being done."""

_LOG = logging.getLogger(__name__)
_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Job:
    """What every stage gets; `seconds` fills up as stages end. `shard` says which processes calibrate together."""

    recipe: Recipe
    output: Path
    choice: TargetChoice
    work: WorkDir
    keep_graphs: bool
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    shard: Shard = field(default_factory=Shard)

    @property
    def target(self) -> Target:
        """The machine that the engine is for."""
        return self.choice.target

    @property
    def gate_folder(self) -> Path:
        """Where the gate keeps its reference and verdict for this target."""
        return self.work.file(f"gate.{self.target.name}")

    def beside(self, ending: str) -> Path:
        """A file beside the output, of the same name with another ending (`.report.html`)."""
        return self.output.with_name(self.output.stem + ending)

    def timed(self, name: str, stage: Callable[Concatenate[Job, _P], _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run `stage(self, …)` and note its wall time under `name`."""
        _LOG.debug(STAGE_BEGINS, name)
        start = time.perf_counter()
        result = stage(self, *args, **kwargs)
        return_freed_memory()
        release_mapped_weights()
        self.seconds[name] = time.perf_counter() - start
        _LOG.debug(STAGE_ENDS, name)
        return result


def open_job(
    recipe: Recipe,
    output: str | Path,
    work_dir: str | Path | None,
    *,
    fresh: bool,
    keep_graphs: bool,
    progress: Progress,
    shard: Shard | None = None,
) -> Job:
    """Check the output, choose the target and open the work folder.

    Raises `InputError` for an output that cannot be written, and a compute type, kernels or a storage that the target
    lacks, before any work is done.
    """
    target = chosen_target(recipe, output).target
    choice, work = open_work(recipe.target, Path(output), work_dir, fresh=fresh, progress=progress)
    choice = replace(choice, target=target)
    progress.note(
        f"computing in {recipe.compute}, quantized linears by {target.kernels} kernels, storage: {target.storage_text}"
    )
    return Job(recipe, Path(output), choice, work, keep_graphs, progress, shard=shard or Shard())


def chosen_target(recipe: Recipe, output: str | Path) -> TargetChoice:
    """The machine that a recipe and an output mean, with the recipe's kernels and storage, and why.

    Raises `InputError` for an output, a compute type, kernels or a storage that the machine does not have.
    """
    return fitted_target(recipe, resolve_target(recipe.target, output))


def fitted_target(recipe: Recipe, choice: TargetChoice) -> TargetChoice:
    """The chosen machine with the recipe's kernels and storage. Raises `InputError` for a compute type, kernels or a
    storage that it lacks."""
    check_compute(recipe.name, recipe.compute, choice.target)
    target = choice.target.with_kernels(recipe.kernels)
    return replace(choice, target=target if recipe.storage == "auto" else target.with_storage(recipe.storage))


def open_work(
    target: str, output: Path, work_dir: str | Path | None, *, fresh: bool, progress: Progress
) -> tuple[TargetChoice, WorkDir]:
    """Choose the machine that `output` is for (`target` may be auto) and open the work folder.

    Raises `InputError` for an output that cannot be written.
    """
    choice = resolve_target(target, output)
    if output.is_dir():
        raise InputError(f"{output}: is a folder; give the output another name")
    work = open_work_dir(output, work_dir, fresh=fresh)
    progress.note(f"target {choice.target.name} ({choice.reason})")
    missing = missing_builder(choice.target)
    if missing:
        progress.note(f"warning: {missing}: everything up to the lowered graph will be made")
    return choice, work


def default_work_dir(output: Path, work_dir: str | Path | None) -> Path:
    """The work folder's path: NAME.work beside `output` unless `work_dir` is another."""
    return Path(work_dir) if work_dir is not None else output.with_name(f"{output.stem}.work")


def open_work_dir(output: Path, work_dir: str | Path | None, *, fresh: bool) -> WorkDir:
    """Open the work folder, NAME.work beside `output` unless `work_dir` is another.

    Raises `InputError` where one of them cannot be written.
    """
    folder = default_work_dir(output, work_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, so it cannot be the work folder; use --work-dir")
    _check_folder(output, output.parent)
    _check_folder(folder, folder if folder.is_dir() else folder.parent)
    return WorkDir.open(folder, fresh=fresh)


def _check_folder(path: Path, folder: Path) -> None:
    """Raise `InputError` unless `path` can be written in `folder`, as far as permissions tell."""
    if not folder.is_dir():
        raise InputError(f"{path}: the folder {folder} does not exist; make it first: mkdir -p {folder}")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: the folder {folder} is not writable")
