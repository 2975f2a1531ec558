"""Findings on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from exporter.bisect.engine_findings import EngineFindings, LayerTrials
from exporter.bisect.findings import Findings
from exporter.bisect.free_run import FreeRun
from exporter.bisect.parts import Part
from exporter.bisect.trial import Trial
from exporter.gate.table import SNR_CEILING_DB, GateRow

_MOST_LINEARS = 20


def print_findings(found: Findings | EngineFindings, console: Console) -> None:
    """Print the blocks, the deviating layers or operators, the trials and the verdict."""
    if isinstance(found, EngineFindings):
        tables, lines = [_engine_table(found)], _layer_lines(found.layers)
    else:
        tables, lines = [_block_table(found)], _part_and_trial_lines(found)
        tables += [_linear_table(found)] if found.guilty_linears else []
    for table in tables:
        console.print(table)
    lines = [_free_line(found.free), *lines, *(f"note: {note}" for note in found.notes)]
    lines.append(("clean: " if found.clean else "found: ") + found.verdict)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _engine_table(found: EngineFindings) -> Table:
    table = Table(title=f"{found.file}: engine for {found.target}", title_justify="left")
    for heading in ("place", "free-running dB", "given its inputs dB", "needed", ""):
        table.add_column(heading, justify="right" if "d" in heading else "left")
    free = {row.name.removesuffix(".output"): row.snr_db for row in found.free.rows}
    for row in found.blocks:
        alone = _db(free[row.name]) if row.name in free else ""
        mark = _mark(row.passed, first=row.name == found.place)
        table.add_row(row.name, alone, _db(row.snr_db), f"{row.threshold_db:.1f}", mark)
    return table


def _layer_lines(layers: LayerTrials | None) -> list[str]:
    """The layers that heal the block; where none does, what all of them together do."""
    if layers is None or not layers.reproduced:
        return []
    healing = layers.healing
    shown = healing or layers.trials[-1:]
    return [line for trial in shown for line in _trial_lines(trial, rules=trial in healing[:1])]


def _part_and_trial_lines(found: Findings) -> list[str]:
    lines = _part_lines(found.part) if found.part is not None else []
    for trial in found.trials:
        lines += _trial_lines(trial, rules=trial.goes_away)
    return lines


def _free_line(free: FreeRun) -> str:
    left = f"leaves the reference at {free.first}" if free.first else "stays with the reference to its end"
    return f"free-running, it {left}; {free.how}; held to {free.limit_db:.1f} dB"


def _block_table(found: Findings) -> Table:
    table = Table(title=f"{found.file}: {found.stage} graph for {found.target}", title_justify="left")
    for heading in ("place", "free-running dB", "given its inputs dB", "needed", "linears deviating", ""):
        table.add_column(heading, justify="right" if "d" in heading and heading != "linears deviating" else "left")
    free = {row.name.removesuffix(".output"): row.snr_db for row in found.free.rows}
    for row in found.look.blocks:
        inside = [linear for linear in found.linears if linear.name.startswith(f"{row.name}.")]
        wrong = [linear for linear in inside if not linear.passed]
        off = [one for one in found.look.inputs if one.block == row.name and not one.passed]
        table.add_row(
            row.name,
            _db(free[row.name]) if row.name in free else "",
            _db(row.snr_db),
            f"{row.threshold_db:.1f}",
            f"{len(wrong)} of {len(inside)}" if inside else "",
            _mark(row.passed and not wrong and not off, first=row.name == found.place),
        )
    return table


def _mark(right: bool, *, first: bool) -> str:
    if right:
        return "[green]ok[/]"
    return "[bold red]deviates first[/]" if first else "[red]deviates[/]"


def _linear_table(found: Findings) -> Table:
    rows = found.guilty_linears
    title = f"{len(rows)} of {len(found.linears)} quantized linears deviate, given the reference's inputs"
    table = Table(title=title, title_justify="left")
    for heading in ("layer", "SNR dB", "needed", "codes differing", "what"):
        table.add_column(heading, justify="right" if heading in {"SNR dB", "needed"} else "left")
    for row in rows[:_MOST_LINEARS]:
        table.add_row(row.name, _db(row.snr_db), f"{row.threshold_db:.1f}", _codes(row), row.detail)
    return table


def _codes(row: GateRow) -> str:
    return f"{row.code_mismatches} of {row.code_count}" if row.code_count else ""


def _db(snr_db: float) -> str:
    return "exact" if snr_db >= SNR_CEILING_DB else f"{snr_db:.1f}"


def _part_lines(part: Part) -> list[str]:
    return [
        f"operators before {part.before}: {_db(part.snr_db)} dB, {part.needed_db:.1f} needed",
        f"  they read    {', '.join(part.after)}",
        f"  their types  {', '.join(part.operators)}",
        f"  their names  {', '.join(part.nodes)}",
    ]


def _trial_lines(trial: Trial, *, rules: bool) -> list[str]:
    effects = ", ".join(
        f"{effect.name} {_db(effect.before_db)} → {_db(effect.after_db)} dB ({effect.needed_db:.1f} needed)"
        for effect in trial.effects
    )
    answer = "the deviation goes away" if trial.goes_away else "a deviation is left"
    layers = trial.layers[0] if len(trial.layers) == 1 else f"all {len(trial.layers)} layers"
    lines = [f"with {layers} in FP32: {answer}: {effects or 'no block changes'}"]
    if rules:
        lines += ["to keep that in high precision, put before the recipe's other rules:", "layers:"]
        lines += [f"  {rule}" for rule in trial.rules]
    return lines
