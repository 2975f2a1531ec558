"""The commands that check an export: whether and where it leaves its reference, and which numbers FP16 cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli_bundle import is_bundle, refuse_lists, validate_bundle
from exporter.errors import FidelityError, InputError
from exporter.targets import SUFFIXES
from exporter.terminal import DEBUG, QUIET, WORK_DIR, open_console, open_progress

if TYPE_CHECKING:
    from exporter.bisect.engine_findings import EngineFindings
    from exporter.bisect.findings import Findings


@click.command(short_help="Repeat the validation of an engine that an export wrote.")
@click.argument("file")
@QUIET
@DEBUG
def validate(file: str, *, quiet: bool, debug: bool) -> None:
    """Compare FILE, written by an earlier export, with the reference saved in its work folder.

    A bundle is checked byte by byte, then its graphs run against the reference that it carries.
    """
    if is_bundle(file):
        validate_bundle(file, quiet=quiet, progress=open_progress(quiet=quiet))
        return
    from exporter.pipeline import validate_output

    if not Path(file).is_file():
        raise InputError(f"{file}: no such file; validate takes an output that fp4export wrote")
    validate_output(file, progress=open_progress(quiet=quiet))


@click.command(short_help="Find the block and the layer where an output leaves the reference.")
@click.argument("file")
@click.option("--engine", is_flag=True, help="Bisect the engine that FILE, a lowered graph, is built into.")
@click.option(
    "--against",
    multiple=True,
    metavar="OUTPUTS",
    help="What the device recorded of the engine: boundaries.outputs.json, then layers.outputs.json.",
)
@click.option("--no-trial", is_flag=True, help="Do not compute deviating layers in FP32 to see whether that helps.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@QUIET
@DEBUG
def bisect(
    file: str, *, engine: bool, against: tuple[str, ...], no_trial: bool, as_json: bool, quiet: bool, debug: bool
) -> int:
    """Find where FILE, an output of an export or a graph in its work folder, leaves the reference.

    A graph runs in ONNX Runtime: free, with the boundaries between its blocks as outputs, then every block, and every
    quantized linear, on the reference's own inputs, so that the first guilty one is named whatever the others do.
    Layers that deviate are computed in FP32 to see whether the deviation goes away; then the rule for the recipe is
    printed.

    An engine (NAME.plan, or a lowered graph with --engine) is built once more, with its boundaries as outputs, and
    runs where its GPU is. If that is not here, NAME.bisect/ is what to take there, and a script in it leaves the
    outputs that --against goes on with. The layers of a block that deviates are then tried in FP32 in the same way.

    Ends with 0 where nothing deviates, with 4 where something does, and with 3 where it is the device's turn.
    """
    from exporter.bisect.engine import bisect_engine
    from exporter.bisect.search import bisect as bisect_graph
    from exporter.bisect.show import print_findings

    progress, recorded = open_progress(quiet=quiet), [Path(outputs) for outputs in against]
    found: Findings | EngineFindings
    if engine or recorded or Path(file).suffix in SUFFIXES["tensorrt"]:
        found = bisect_engine(file, recorded, trial=not no_trial, progress=progress)
    else:
        found = bisect_graph(file, trial=not no_trial, progress=progress)
    if as_json:
        click.echo(found.to_json())
    elif not quiet:
        print_findings(found, open_console(stderr=False))
    return 0 if found.clean else FidelityError.exit_code


@click.command(short_help="Find the tensors that FP16 cannot hold.")
@click.argument("recipe")
@click.option("-o", "--output", required=True, metavar="OUT", help="The engine: NAME.onnx, NAME.plan or NAME.engine.")
@click.option("--target", metavar="TARGET", help="The machine that OUT is for, instead of the recipe's.")
@click.option("--seed", type=int, metavar="N", help="Seed of the calibration, instead of the recipe's.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Change one value of the recipe.")
@WORK_DIR
@click.option("--top", type=click.IntRange(min=1), default=15, metavar="N", help="How many tensors to show (15).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document with all tensors instead of a table.")
@QUIET
@DEBUG
def ranges(
    recipe: str,
    output: str,
    target: str | None,
    seed: int | None,
    overrides: tuple[str, ...],
    work_dir: str | None,
    *,
    top: int,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Measure how large every tensor outside the quantized linears gets on the calibration inputs, in FP32.

    Takes the words of the export, and shares its work folder: what an export finished is not done again, and OUT is
    not written. Names what becomes infinite in FP16, what comes near it, and how far BF16 rounds.
    """
    if is_bundle(output):
        raise InputError(f"{output}: ranges are measured for one target: -o NAME.onnx, or -o NAME.plan --target TARGET")
    refuse_lists(target, output)
    from exporter.job import open_job
    from exporter.range_scan import print_scan, scan_ranges
    from exporter.recipe import load_recipe

    loaded = load_recipe(recipe, overrides, target, seed)
    progress = open_progress(quiet=quiet)
    scan = scan_ranges(open_job(loaded, output, work_dir, fresh=False, keep_graphs=False, progress=progress))
    if as_json:
        click.echo(scan.to_json())
    elif not quiet:
        print_scan(scan, open_console(stderr=False), top)
