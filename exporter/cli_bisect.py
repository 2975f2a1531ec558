"""The command that looks for where a graph leaves its reference."""

from __future__ import annotations

import click

from exporter.errors import FidelityError
from exporter.terminal import DEBUG, QUIET, open_console, open_progress


@click.command(short_help="Find the block and the layer where a graph leaves the reference.")
@click.argument("file")
@click.option("--no-trial", is_flag=True, help="Do not compute deviating layers in FP32 to see whether that helps.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@QUIET
@DEBUG
def bisect(file: str, *, no_trial: bool, as_json: bool, quiet: bool, debug: bool) -> int:
    """Find where FILE, an .onnx that an export wrote or a graph in its work folder, leaves the reference.

    First the graph runs free, with the boundaries between its blocks as outputs. Then every block, and every quantized
    linear, gets the reference's own inputs, so that the first guilty one is named whatever the others do. Layers that
    deviate are computed in FP32 to see whether the deviation goes away; then the rule for the recipe is printed.

    Ends with 0 where nothing deviates and with 4 where something does.
    """
    from exporter.bisect.search import bisect as search
    from exporter.bisect.show import print_findings

    found = search(file, trial=not no_trial, progress=open_progress(quiet=quiet))
    if as_json:
        click.echo(found.to_json())
    elif not quiet:
        print_findings(found, open_console(stderr=False))
    return 0 if found.clean else FidelityError.exit_code
