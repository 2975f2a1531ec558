"""The commands whose first word is an ONNX file: quantizing one, and looking into one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from exporter.cli_bundle import inspect_bundle, is_bundle
from exporter.targets import AUTO, resolve_target
from exporter.terminal import DEBUG, OUTPUT, QUIET, WORK_DIR, open_console, open_progress

if TYPE_CHECKING:
    from exporter.layer_section import Scales

MODEL_SUFFIX = ".onnx"


@click.command(name="quantize", hidden=True, short_help="Quantize an ONNX model (what MODEL.onnx as first word does).")
@click.argument("model", metavar="MODEL.onnx")
@OUTPUT
@click.option("--format", "weight", metavar="FORMAT", help="Weight format, for example e2m1; not for exported graphs.")
@click.option("--activation", metavar="FORMAT", help="Activation format, or none for weights alone (default: e2m3).")
@click.option(
    "--scales",
    type=click.Choice(["foldable", "channel", "group"]),
    help="Weight scales (default: foldable where the format leaves room, else channel).",
)
@click.option("--group", type=int, metavar="N", help="Weights of a row that share a scale (default: 128).")
@click.option(
    "--keep", multiple=True, metavar="PATTERN", help="Layers to leave in high precision (* and ?); may be repeated."
)
@click.option("--target", default=AUTO, metavar="TARGET", help="The machine that OUT is for (default: auto).")
@WORK_DIR
@click.option("--dry-run", is_flag=True, help="Print what becomes of every linear layer. Writes nothing.")
@click.option("--no-validate", is_flag=True, help="Skip the comparison with MODEL.onnx on random inputs.")
@QUIET
@DEBUG
def quantize(
    model: str,
    output: str,
    weight: str | None,
    activation: str | None,
    scales: Scales | None,
    group: int | None,
    keep: tuple[str, ...],
    target: str,
    work_dir: str | None,
    *,
    dry_run: bool,
    no_validate: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Quantize MODEL.onnx, or lower a graph that fp4export exported; `fp4export --help` tells the whole story."""
    from pathlib import Path

    choice = resolve_target(target, output)
    from exporter.onnx_input.job import load_source, quantize_onnx
    from exporter.onnx_input.selection import format_options
    from exporter.onnx_input.show import print_plan, summary_lines

    options = format_options(weight, activation, scales, group, keep)
    if dry_run:
        print_plan(load_source(Path(model), options, choice.target), choice, output, open_console(stderr=False))
        return
    result = quantize_onnx(
        model,
        output,
        options,
        target=target,
        work_dir=work_dir,
        validate=not no_validate,
        progress=open_progress(quiet=quiet),
    )
    if not quiet:
        for line in summary_lines(result):
            click.echo(line)


@click.command(name="inspect", short_help="Show what is in an .onnx file, an engine or a bundle.")
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@DEBUG
def inspect_file(file: str, *, as_json: bool, debug: bool) -> None:
    """Show FILE's quantized layers, sizes, operators, and node counts before and after every pass.

    FILE is a graph or an output of fp4export, any other .onnx file, or an engine, which is shown through the graph
    that it was built from; or a bundle, whose files are all checked first.
    """
    if is_bundle(file):
        inspect_bundle(file, as_json=as_json)
        return
    from pathlib import Path

    from exporter.inspection.report import inspect_path
    from exporter.inspection.show import print_inspection

    found = inspect_path(Path(file))
    if as_json:
        click.echo(found.to_json())
    else:
        print_inspection(found, open_console(stderr=False))
