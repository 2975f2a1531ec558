"""`fp4export inspect NAME.bundle`: what a checked bundle holds, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exporter.bundle.manifest import TargetEntry
from exporter.bundle.read import Bundle
from exporter.describe import size_text


def bundle_json(bundle: Bundle) -> str:
    """One indented JSON document: the folder, the manifest's checksum and the manifest."""
    document = {"bundle": str(bundle.root), "sha256": bundle.manifest.checksum, **asdict(bundle.manifest)}
    return json.dumps(document, indent=1)


def print_bundle(bundle: Bundle, console: Console) -> None:
    """Print facts, the targets and the files."""
    for name, value in _facts(bundle):
        console.print(f"{name:<10}{value}", markup=False, highlight=False, soft_wrap=True)
    console.print(_target_table(bundle))
    table = Table(title=f"{len(bundle.manifest.files)} files, all as they were written", title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    table.add_column("SHA-256")
    for file in bundle.manifest.files:
        table.add_row(escape(file.path), size_text(file.bytes), f"{file.sha256[:16]}…")
    console.print(table)


def _facts(bundle: Bundle) -> list[tuple[str, str]]:
    manifest = bundle.manifest
    weights = manifest.weights
    stated = f" (stated in {weights.licence_from})" if weights.licence_from else " (the model's folder states none)"
    return [
        ("bundle", str(bundle.root)),
        ("sha256", manifest.checksum),
        ("weights", weights.source),
        ("licence", weights.licence + stated),
        ("size", size_text(sum(manifest.sizes.values()))),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]


def _target_table(bundle: Bundle) -> Table:
    table = Table(title="targets", title_justify="left")
    for heading in ("target", "engine", "compute", "graph", "size", "kernels", "accepted from"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for target in bundle.manifest.targets:
        accepted = "-" if target.acceptance is None else f"{target.acceptance.snr_db:g} dB SNR"
        facts = (target.name, target.engine, target.compute, target.lowered)
        size = size_text(_graph_bytes(bundle, target))
        table.add_row(*map(escape, facts), size, escape(_kernels(bundle, target)), accepted)
    return table


def _graph_bytes(bundle: Bundle, target: TargetEntry) -> int:
    """Size of a target's lowered graph with the files that its weights are in, which are named after it."""
    names = (target.lowered, f"{target.lowered}.")
    return sum(size for path, size in bundle.manifest.sizes.items() if path == names[0] or path.startswith(names[1]))


def _kernels(bundle: Bundle, target: TargetEntry) -> str:
    if target.kernels is None:
        return "-"
    count = sum(path.startswith(f"{target.kernels}/") and path.endswith(".ptx") for path in bundle.manifest.sizes)
    return f"{count} in {target.kernels}"
