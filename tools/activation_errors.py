"""Measure what quantized activations alone cost each kind of layer of the digits model, and what its inputs are like.

`python -m tools.activation_errors` takes a minute and writes the section "activations" of docs/quality.md: what tells
floats from integers there. Weights stay as they are.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console
from torch import Tensor, nn

from exporter.calibration_stages import captured_inputs
from exporter.gate.snr import power_ratio_db
from exporter.model_stages import balanced
from exporter.progress import RichProgress
from exporter.quantize import planned_linear
from exporter.rounding import InputQuantizer
from exporter.source import load_source
from exporter.transforms.linear import SHIFTS
from plugins.formats import get_format
from tools.marked_section import markdown_table, replace_section
from tools.quality_cells.cells import Laboratory, digits_laboratory
from tools.quality_cells.layers import quantize_with_zero_point

ROOT = Path(__file__).parents[1]
SECTION = "activations: written by tools/activation_errors.py"
SEED = 0

Quantizer = Callable[[Tensor], Tensor]
"""An input [..., K] → what a layer reads instead."""

_BEHIND_GELU = "ff.net.2"


def quantizer(name: str) -> Quantizer:
    """Of a format by its name, with one scale a token."""
    return InputQuantizer(get_format(name)).fake_quantize


def without_sign(name: str) -> Quantizer:
    """Of what a GELU makes, raised by its least value, in a format without a sign."""

    def quantize(x: Tensor) -> Tensor:
        return quantizer(name)(x + SHIFTS["gelu"]) - SHIFTS["gelu"]

    return quantize


def quantizers(behind_gelu: bool) -> Mapping[str, Quantizer]:
    """What a layer's input may be quantized by, by title; some are for what a GELU makes only."""
    found: dict[str, Quantizer] = {}
    for bits, signed, unsigned in ((8, "e4m3", ""), (6, "e2m3", "ue2m4"), (4, "e2m1", "ue2m2")):
        found[f"INT{bits}"] = quantizer(f"int{bits}")
        found[f"INT{bits}, zero point"] = partial(quantize_with_zero_point, bits=bits)
        found[signed.upper()] = quantizer(signed)
        if unsigned and behind_gelu:
            found[unsigned.upper()] = without_sign(unsigned)
    return found


@dataclass
class LayerInputs:
    """What one layer's inputs are like, and the powers of its output and of what quantized inputs change in it."""

    weight: Tensor
    quantizers: Mapping[str, Quantizer]
    largest: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: float = 0.0
    negative_square: float = 0.0
    output: float = 0.0
    errors: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, x: Tensor) -> None:
        """See inputs [B, ..., K]."""
        x = x.flatten(0, -2)
        self.largest = torch.maximum(self.largest, x.abs().amax(dim=0))
        self.square += float(x.square().sum())
        self.negative_square += float(x.clamp(max=0).square().sum())
        self.output += float((x @ self.weight.T).square().sum())
        for title, quantize in self.quantizers.items():
            self.errors[title] += float(((quantize(x) - x) @ self.weight.T).square().sum())

    @property
    def spread(self) -> float:
        """The largest channel's amax over the median channel's."""
        return float(self.largest.max() / self.largest.median())

    def snr_db(self, title: str) -> float:
        """Power of the output over that of its error with this quantizer."""
        return power_ratio_db(self.output, self.errors[title])


@click.command(help=__doc__)
@click.option("--page", type=click.Path(path_type=Path), default=ROOT / "docs" / "quality.md", help="Where it goes.")
def main(page: Path) -> None:
    """Watch the layers' inputs, as they are and balanced, and write the table."""
    laboratory = digits_laboratory(RichProgress(Console(stderr=True)))
    replace_section(page, SECTION, section(*(watched(laboratory, balance) for balance in (False, True))))


def watched(laboratory: Laboratory, balance: bool) -> dict[str, list[LayerInputs]]:
    """The inputs of all quantized layers on the calibration set, by kind of layer: its path within a block."""
    changes = (f"method.balance={str(balance).lower()}", f"calibration.seed={SEED}")
    job = laboratory.job(changes, f"seed{SEED}")
    source = load_source(job)
    captured = captured_inputs(job, source)
    source = balanced(job, source, captured)
    kinds: dict[str, list[LayerInputs]] = defaultdict(list)
    watchers = {}
    for layer in source.plan.layers:
        kind = ".".join(layer.name.split(".")[2:])
        linear: nn.Linear = planned_linear(source.model, layer)
        inputs = LayerInputs(linear.weight.detach(), quantizers(behind_gelu=kind == _BEHIND_GELU))
        kinds[kind].append(inputs)
        watchers[layer.name] = inputs.add
    source.calibration_run(captured).through(source.model, watchers)
    return kinds


def section(plain: Mapping[str, Sequence[LayerInputs]], even: Mapping[str, Sequence[LayerInputs]]) -> str:
    """Both tables as Markdown: as the model is, and balanced."""
    return "\n".join(
        [
            "# Activations alone",
            "",
            "What quantized activations cost, weights as they are: power of a layer's output over that of its error in",
            f"dB, the mean over the blocks, on the inputs captured with seed {SEED}. Spread: the largest channel's",
            "absolute maximum over the median channel's. Below 0: share of the inputs' power.",
            "",
            "As the model is:",
            "",
            _table(plain),
            "",
            "Balanced:",
            "",
            _table(even),
        ]
    )


def _table(kinds: Mapping[str, Sequence[LayerInputs]]) -> str:
    titles = list(quantizers(behind_gelu=True))
    lines = []
    for kind, layers in kinds.items():
        spread = statistics.mean(layer.spread for layer in layers)
        below = sum(layer.negative_square for layer in layers) / sum(layer.square for layer in layers)
        figures = [
            f"{statistics.mean(layer.snr_db(title) for layer in layers):.1f}" if title in layers[0].quantizers else "–"
            for title in titles
        ]
        lines.append([f"`{kind}`", f"{spread:.1f}", f"{100 * below:.0f} %", *figures])
    return markdown_table(["layer", "spread", "below 0", *titles], lines)


if __name__ == "__main__":
    main()
