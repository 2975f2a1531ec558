"""The main job with a bundle as its output: one export per target, their graphs put together in one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exporter import __version__
from exporter.bundle.licence import Licence, find_licence
from exporter.bundle.manifest import Acceptance, Manifest, TargetEntry, WeightsEntry
from exporter.bundle.readme import README, readme_text
from exporter.bundle.write import check_place, copy_file, listed_files, new_folder, seal
from exporter.device.acceptance import INPUTS, OUTPUTS, VERDICT
from exporter.errors import InputError
from exporter.gate.records import Reference
from exporter.gate.table import GateResult
from exporter.gate.whole import save_runs
from exporter.job import Job, fitted_target, open_work_dir
from exporter.metrics import installed_versions
from exporter.onnx_files import external_files, read_model
from exporter.pipeline import finish_lowered, prepare
from exporter.progress import NullProgress, Progress
from exporter.recipe import Recipe
from exporter.targets import AUTO, TargetChoice, get_target, resolve_target
from exporter.yaml_text import dump_yaml
from plugins.kernels.library import INDEX, kernels_folder

RECIPE = "recipe.yaml"
LICENCE = "LICENSE.weights"


@dataclass(frozen=True)
class BundleResult:
    """Where the bundle and the work folder are, and what is in the bundle."""

    output: Path
    work_dir: Path
    manifest: Manifest


def choose_targets(names: str) -> tuple[TargetChoice, ...]:
    """The targets in a comma-separated list; ``auto`` is the one that it is for an engine.

    Raises `InputError` for an unknown one and for one given twice.
    """
    asked = [name.strip() for name in names.split(",")]
    choices = [
        resolve_target(AUTO, "engine.plan") if name == AUTO else TargetChoice(get_target(name), "as asked for")
        for name in asked
    ]
    found = [choice.target.name for choice in choices]
    if len(set(found)) != len(found):
        raise InputError(f"--target {names}: a target is there twice")
    return tuple(choices)


def target_recipes(recipe: Recipe, targets: Sequence[TargetChoice]) -> tuple[tuple[Recipe, TargetChoice], ...]:
    """Every target with the recipe for it: `kernels: plugin` is meant for those that run plugins.

    The others get their native kernels, which the reason says. Where no target runs plugins the recipe is left as it
    is, for the export to refuse.
    """
    if recipe.kernels == "native" or not any(choice.target.plugin_containers for choice in targets):
        return tuple((recipe, choice) for choice in targets)
    native = recipe.model_copy(update={"kernels": "native"})
    return tuple(
        (recipe, choice)
        if choice.target.plugin_containers
        else (native, replace(choice, reason=f"{choice.reason}; native kernels, since it runs no plugins"))
        for choice in targets
    )


def export_bundle(
    recipe: Recipe,
    output: str | Path,
    targets: Sequence[TargetChoice],
    *,
    work_dir: str | Path | None = None,
    validate: bool = True,
    keep_graphs: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
) -> BundleResult:
    """Export `recipe` for every target and write the bundle, whole or not at all; nothing is built or evaluated.

    All targets share the work folder, so that what they have in common is made once. `kernels: plugin` is for the
    targets that run plugins, if any does (`target_recipes`). Raises the errors of
    `exporter.errors`.
    """
    output, progress = Path(output), progress or NullProgress()
    if not targets:
        raise InputError(f"{output}: no target was given")
    asked = [(own, fitted_target(own, choice)) for own, choice in target_recipes(recipe, targets)]
    check_place(output)
    work = open_work_dir(output, work_dir, fresh=fresh)
    graphs = []
    with work.locked():
        for own, choice in asked:
            progress.note(f"target {choice.target.name} ({choice.reason})")
            job = Job(own, output, choice, work, keep_graphs, progress)
            made = prepare(job, validate=validate)
            finish_lowered(job, made, validate=validate)
            graphs.append(_Graphs(job, made.exported, made.lowered, validated=validate))
            weights = _Weights(find_licence(made.source.files), made.source.identity)
        with new_folder(output) as folder:
            entries = tuple(_collect(one, folder) for one in graphs)
            manifest = _finish(recipe, weights, entries, folder, output)
    size = sum(manifest.sizes.values())
    progress.note(f"wrote {output} ({size / 1e6:.2f} MB in {len(manifest.files)} files)")
    return BundleResult(output, work.path, manifest)


@dataclass(frozen=True)
class _Graphs:
    """One target's graphs in the work folder."""

    job: Job
    exported: Path
    lowered: Path
    validated: bool


@dataclass(frozen=True)
class _Weights:
    """The licence of the model's weights, and file name → SHA-256 of all that was read."""

    licence: Licence
    identity: Mapping[str, str]


def _collect(made: _Graphs, folder: Path) -> TargetEntry:
    """Copy one target's files into the bundle."""
    job = made.job
    for graph in (made.exported, made.lowered):
        copy_file(graph, folder, graph.name)
        for data in sorted(external_files(read_model(graph, external_data=False), graph)):
            copy_file(data, folder, data.relative_to(graph.parent).as_posix())
    # An earlier export of another recipe may have left its kernels in the work folder.
    kernels = kernels_folder(made.lowered) if job.target.kernels == "plugin" else None
    if kernels is not None:
        for file in (kernels / INDEX, *kernels.glob("*.ptx")):
            copy_file(file, folder, f"{kernels.name}/{file.name}")
    return TargetEntry(
        name=job.target.name,
        engine=job.target.engine,
        compute_capability=job.target.compute_capability,
        compute=job.recipe.compute,
        exported=made.exported.name,
        lowered=made.lowered.name,
        kernels=None if kernels is None else kernels.name,
        acceptance=_accepted(job.gate_folder, folder) if made.validated else None,
    )


def _accepted(gate: Path, folder: Path) -> Acceptance:
    """Write what the gate kept of the whole model under the same names, without the boundaries between its blocks."""
    reference = Reference.load(gate).for_stage("lowered")
    (folder / gate.name).mkdir()
    found = Acceptance(
        inputs=f"{gate.name}/{INPUTS}",
        reference=f"{gate.name}/{OUTPUTS}",
        verdict=f"{gate.name}/{VERDICT}",
        snr_db=_rounded_down(reference.end_to_end_threshold),
    )
    save_runs(reference, folder / gate.name, boundaries=False)
    # The commands name files of this machine.
    verdict = replace(GateResult.from_json((gate / VERDICT).read_text(encoding="utf-8")), commands=())
    (folder / found.verdict).write_text(verdict.to_json(), encoding="utf-8")
    return found


def _rounded_down(snr_db: float) -> float:
    """One decimal, so that what passed here passes there."""
    return (snr_db * 10) // 1 / 10


def _finish(
    recipe: Recipe, weights: _Weights, targets: tuple[TargetEntry, ...], folder: Path, output: Path
) -> Manifest:
    """Add recipe, licence, README and manifest, and read everything back."""
    _write_recipe(recipe, folder / RECIPE)
    text = weights.licence.text
    if text is not None:
        copy_file(text, folder, LICENCE)
    entry = WeightsEntry(
        source=_source_name(recipe),
        licence=weights.licence.name,
        licence_from=weights.licence.stated_in,
        licence_file=None if text is None else LICENCE,
        sha256=weights.identity,
    )
    versions = {"fp4export": __version__, **installed_versions()}
    manifest = Manifest(output.stem, RECIPE, entry, versions, targets, files=())
    (folder / README).write_text(readme_text(manifest, output.name), encoding="utf-8")
    return seal(folder, replace(manifest, files=listed_files(folder)))


def _source_name(recipe: Recipe) -> str:
    """The model as the recipe names it: a Hub id, or a folder's own name without what is above it."""
    given = recipe.model.weights
    folder = recipe.resolve_path(given)
    return folder.name if folder.exists() else given


def _write_recipe(recipe: Recipe, path: Path) -> None:
    """The recipe with every default filled in, its paths as it gives them: those of this machine mean nothing there."""
    text = dump_yaml(recipe.model_dump(mode="json", exclude_none=True))
    path.write_text(f"# As exported; paths are those of the machine that exported it.\n{text}", encoding="utf-8")
