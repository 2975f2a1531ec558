"""An inspection on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from exporter.describe import size_text
from exporter.inspection.layers import UNKNOWN
from exporter.inspection.report import Inspection
from exporter.passes.history import IMPORTED


def print_inspection(found: Inspection, console: Console) -> None:
    """Print facts, the layers, the operators and the passes."""
    for name, value in _facts(found):
        console.print(f"{name:<16}{value}", markup=False, highlight=False, soft_wrap=True)
    if found.layers:
        console.print(_layer_table(found))
    if found.operators:
        console.print(_operator_table(found))
    if found.passes:
        console.print(_pass_table(found))
    elif found.graph is not None:
        console.print("passes: none are recorded in this file", markup=False, highlight=False)


def _facts(found: Inspection) -> list[tuple[str, str]]:
    totals = found.totals
    facts = [("file", found.file), ("header", found.header)]
    if found.note:
        facts.append(("note", found.note))
    if found.graph is None:
        return [*facts, ("size", size_text(totals.file_bytes))]
    share = "" if totals.share_of_fp32 is None else f" ({totals.share_of_fp32:.3f} of FP32)"
    return [
        *facts,
        ("graph", f"{found.state}, opset {found.opset}, {totals.nodes} nodes"),
        ("target", found.target or "none"),
        ("size", size_text(totals.file_bytes) + share),
        ("parameters", f"{totals.parameters:,}, {totals.high_precision_parameters:,} of them in high precision"),
    ]


def _layer_table(found: Inspection) -> Table:
    count = found.totals.quantized_layers
    title = f"{count} quantized layers" if count else f"{len(found.layers)} linear layers, none quantized by fp4export"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", no_wrap=True)
    rounds = any(layer.output != UNKNOWN for layer in found.layers)
    for heading in ("weights", "activations", *["output"] * rounds, "scales", "group", "container"):
        table.add_column(heading)
    for heading in ("in x out", "stored"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("stored as", "values as"):
        table.add_column(heading, no_wrap=True)
    for layer in found.layers:
        table.add_row(
            layer.layer,
            layer.weight_format,
            layer.activation_format,
            *[layer.output] * rounds,
            layer.scales,
            str(layer.group_size or "row"),
            layer.container,
            f"{layer.in_features} x {layer.out_features}",
            size_text(layer.weight_bytes),
            layer.stored_type,
            layer.encoding,
        )
    return table


def _operator_table(found: Inspection) -> Table:
    table = Table(title=f"{len(found.operators)} operators", title_justify="left")
    table.add_column("operator", no_wrap=True)
    table.add_column("nodes", justify="right")
    for name, count in found.operators.items():
        table.add_row(name, str(count))
    return table


def _pass_table(found: Inspection) -> Table:
    table = Table(title="passes", title_justify="left")
    table.add_column("pass", no_wrap=True)
    for heading in ("changed", "nodes before", "nodes after"):
        table.add_column(heading, justify="right")
    before = ""
    for result in found.passes:
        if result.name == IMPORTED:
            table.add_row(result.name, "", "", str(result.nodes))
        else:
            table.add_row(result.name, str(result.changed), before, str(result.nodes))
        before = str(result.nodes)
    return table
