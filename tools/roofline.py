"""Write the tables of docs/scaling.md: how long a step takes at least, and what fits, by arithmetic alone.

`python -m tools.roofline` computes them from published peak rates and bandwidths (tools/scaling/hardware.py) and from
the models' layers (tools/scaling/workload.py). Nothing is measured. With `--check` it writes nothing and exits with 1
if the page has other tables.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tools.marked_section import markdown_table, markers, replace_section
from tools.scaling.hardware import GPUS
from tools.scaling.workload import (
    BF16,
    MODELS,
    PRECISIONS,
    W4,
    Model,
    activation_gigabytes,
    attention_operations,
    linears,
    parameters,
    seconds,
    weight_gigabytes,
)

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
SECTION = "roofline"

USABLE = 0.75
"""Of a Jetson's memory, which the system shares."""
_MODULES = (8, 16, 32, 64)


def hardware_table() -> str:
    """The facts."""
    head = ("GPU", "memory", "GB/s", "BF16", "INT8", "FP8", "operations a byte, 8 bits", "rates are")
    rows = []
    for gpu in GPUS:
        name, rate = gpu.eight_bit
        ridge = f"{1000 * rate / gpu.bandwidth:.0f} ({name})"
        rates = ["–" if peak is None else f"{peak:.0f}" for peak in (gpu.bf16, gpu.int8, gpu.fp8)]
        rows.append((gpu.name, f"{gpu.memory_gb:g} GB", f"{gpu.bandwidth:g}", *rates, ridge, gpu.source))
    return markdown_table(head, rows)


def work_table() -> str:
    """Operations of a step."""
    head = ("model", "tokens × 2", "parameters", "in the blocks' linears", "linears", "of them 8-bit", "attention")
    rows = []
    for model in MODELS:
        inside, outside = parameters(model)
        every = linears(model)
        total = sum(linear.operations for linear in every)
        low = sum(linear.operations for linear in every if linear.quantized)
        rows.append(
            (
                model.name,
                f"{model.side**2}",
                f"{(inside + outside) / 1e6:.0f} M",
                f"{inside / (inside + outside):.1%}",
                f"{total / 1e12:.2f} T",
                f"{low / total:.1%}",
                f"{attention_operations(model) / 1e12:.2f} T",
            )
        )
    return markdown_table(head, rows)


def time_table(model: Model) -> str:
    """The least milliseconds of a step on every GPU."""
    head = ("GPU", *(precision.name for precision in PRECISIONS), "BF16 over 4 bits", "of it at memory's limit")
    rows = []
    for gpu in GPUS:
        times = [seconds(model, precision, gpu)[0] for precision in PRECISIONS]
        total, at_memory = seconds(model, W4, gpu)
        base = seconds(model, BF16, gpu)[0]
        milliseconds = [
            f"{1000 * time:{'.0f' if time >= 0.1 else '.1f' if time >= 0.01 else '.2f'}} ms" for time in times
        ]
        rows.append((gpu.name, *milliseconds, f"{base / total:.2f} ×", f"{at_memory / total:.0%}"))
    return markdown_table(head, rows)


def _milliseconds(time: float) -> str:
    digits = 0 if time >= 0.1 else 1 if time >= 0.01 else 2
    return f"{1000 * time:.{digits}f} ms"


def memory_table() -> str:
    """Weights and activations of the transformer."""
    head = ("model", *(f"{precision.name}: weights + activations" for precision in PRECISIONS))
    rows = [
        (
            model.name,
            *(
                f"{weight_gigabytes(model, precision):.2f} + {activation_gigabytes(model, precision):.2f} GB"
                for precision in PRECISIONS
            ),
        )
        for model in MODELS
    ]
    return markdown_table(head, rows)


def t5_parameters(width: int, inner: int, vocabulary: int, layers: int = 24, heads: int = 32) -> int:
    """An encoder of T5 1.1: attention of heads of 64, a gated feed-forward, embeddings."""
    return vocabulary * width + layers * (4 * width * 64 * heads + 3 * width * inner)


ENCODERS = {
    "pixart": ("T5 1.1 XXL", t5_parameters(4096, 10240, 32128, heads=64)),
    "hunyuan": ("mT5 XL and a CLIP of 350 M", t5_parameters(2048, 5120, 250112) + 350_000_000),
}
"""Text encoders by family, and their parameters."""
_VAE_PARAMETERS = 84_000_000
_VAE_CHANNELS, _VAE_MAPS = 128, 4


def _vae_gigabytes(model: Model) -> float:
    pixels = (16 * model.side) ** 2
    return 2 * (_VAE_PARAMETERS + _VAE_MAPS * _VAE_CHANNELS * pixels) / 1e9


def fit_table() -> str:
    """What fits the Orin modules."""
    head = ("model", "what is in memory at once", "precision", "GB", *(f"Orin {size} GB" for size in _MODULES))
    rows = []
    for model in MODELS:
        encoder, count = ENCODERS[model.family]
        for precision in (BF16, W4):
            own = weight_gigabytes(model, precision) + activation_gigabytes(model, precision)
            with_vae = own + _vae_gigabytes(model)
            for what, size in (
                ("transformer and VAE, prompts encoded elsewhere", with_vae),
                (f"and {encoder}, 16 bits", with_vae + 2 * count / 1e9),
            ):
                fits = ["yes" if size <= USABLE * module else "no" for module in _MODULES]
                rows.append((model.name, what, precision.name, f"{size:.1f}", *fits))
    return markdown_table(head, rows)


def text() -> str:
    """All tables with their headings."""
    sections = [
        ("## The GPUs", hardware_table()),
        ("## The work of a step", work_table()),
        *((f"## {model.name}: the least time of a step", time_table(model)) for model in MODELS),
        ("## Memory of the transformer", memory_table()),
        ("## What fits", fit_table()),
    ]
    return "\n\n".join(f"{heading}\n\n{table}" for heading, table in sections)


def is_current() -> bool:
    """Whether the page has these tables."""
    start, end = markers(SECTION)
    return f"{start}\n{text()}\n{end}" in PAGE.read_text(encoding="utf-8")


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if the page has other tables.")
def main(check: bool) -> None:
    """Write, or compare."""
    if not check:
        replace_section(PAGE, SECTION, text())
    elif not is_current():
        print(f"{PAGE}: its tables are not this source's; run python -m tools.roofline", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
