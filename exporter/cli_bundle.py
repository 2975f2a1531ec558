"""What the commands do with bundles: exporting to one, looking into one, validating one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.device.program import BUNDLE_SUFFIX
from exporter.errors import InputError
from exporter.terminal import open_console

if TYPE_CHECKING:
    from exporter.progress import Progress


def is_bundle(file: str) -> bool:
    """Whether a name is that of a bundle."""
    return Path(file).suffix == BUNDLE_SUFFIX


def export_to_bundle(
    recipe: str,
    output: str,
    overrides: Sequence[str],
    target: str | None,
    seed: int | None,
    *,
    work_dir: str | None,
    dry_run: bool,
    validate: bool,
    keep_graphs: bool,
    fresh: bool,
    progress: Progress,
) -> None:
    """Export `recipe` to the bundle `output`; `target` lists its targets, the recipe's own without it."""
    from exporter.bundle.job import choose_targets, export_bundle, target_recipes
    from exporter.recipe import load_recipe
    from exporter.shards import Shard

    processes = Shard.of_environment().world
    if processes > 1:
        raise InputError(
            f"{output}: {processes} processes cannot make a bundle together: start fp4export without torchrun, "
            "or export to a single target"
        )
    loaded = load_recipe(recipe, overrides, None, seed)
    targets = choose_targets(target if target is not None else loaded.target)
    if dry_run:
        from exporter.activation_room import planned_room, print_room
        from exporter.describe import describe_for, print_description

        console = open_console(stderr=False)
        for own, choice in target_recipes(loaded, targets):
            print_description(describe_for(own, Path(output), choice), console)
        # The same for every target.
        print_room(planned_room(loaded, output, work_dir), console)
        return
    result = export_bundle(
        loaded,
        output,
        targets,
        work_dir=work_dir,
        validate=validate,
        keep_graphs=keep_graphs,
        fresh=fresh,
        progress=progress,
    )
    progress.note(f"bundle   {result.output} (sha256 {result.manifest.checksum})")
    progress.note(f"work     {result.work_dir}")


def inspect_bundle(path: str, *, as_json: bool) -> None:
    """Check the bundle and print what it holds."""
    from exporter.bundle.read import open_bundle
    from exporter.bundle.show import bundle_json, print_bundle

    bundle = open_bundle(path)
    if as_json:
        click.echo(bundle_json(bundle))
    else:
        print_bundle(bundle, open_console(stderr=False))


def validate_bundle(path: str, *, quiet: bool, progress: Progress) -> None:
    """Check the bundle and run its graphs against the reference that it carries."""
    from exporter.bundle.accept import accept_bundle, acceptance_table
    from exporter.bundle.read import open_bundle

    results = accept_bundle(open_bundle(path), progress)
    if not quiet:
        open_console(stderr=False).print(acceptance_table(results))


def refuse_lists(target: str | None, output: str) -> None:
    """Raise `InputError` for several targets with an output that holds one."""
    if target is not None and "," in target:
        raise InputError(f"--target {target}: {output} is for one target; several go into a bundle: -o NAME.bundle")
