"""Run every command on a model of full size as a user would; write what it takes and gives into docs/benchmarks.md.

`python -m tools.full_size_commands` runs them in build/full_size/pixart-28, where `tools.full_size --model pixart` left
the model with random weights and its export for the cpu, `--model hunyuan` in hunyuan-40; what is missing is made
first, with an autoencoder and text encoders of the published width. Each command is a process of its own, whose output
is kept in commands/; one that fails is a row like any other. `--blocks 4` is quick, and is printed instead of written.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from exporter.files import write_text_atomically
from tools.full_size import PAGE, ROOT, made_folder, measured_export, watch, weight_bytes
from tools.full_size_models import MODELS
from tools.full_size_pipeline import PIPELINES, TEXT_ENCODER_LAYERS
from tools.marked_section import replace_section
from tools.this_machine import GB, machine

_LOGS = "commands"
_CAPTIONS = "captions.txt"
_TEXTS = ("a photo of a cat", "a small red house by the sea, oil painting")
_DRAWING = "--steps 2 --count 1"
# What the commands have on the disk at a time, over the transformer's weights: a work folder and a bundle.
_ROOM = 2.5


@dataclass(frozen=True)
class Command:
    """`words` behind `fp4export`, typed in the model's folder.

    `gives` is a pattern in what it prints, `said` the words for it; `leaves` are the names of what it writes, and
    `used_up` of what no command behind it needs.
    """

    words: str
    gives: str
    said: str = r"\g<0>"
    leaves: tuple[str, ...] = ()
    used_up: tuple[str, ...] = ()

    def result(self, code: int, printed: str) -> str:
        """What came of it, in words: of a failure the exit code and the last line."""
        found = re.search(self.gives, printed, re.MULTILINE)
        if found is None or code:
            last = printed.strip().rpartition("\n")[2] or "nothing was printed"
            return f"**exit code {code}**: {last}"
        return " ".join(found.expand(self.said).split())


@dataclass(frozen=True)
class CommandUse:
    """What a command took (wall time; the most resident memory of its process and all that it starts) and gave."""

    words: str
    seconds: float
    peak_bytes: int
    gave: str


COMMANDS = (
    Command("recipe.yaml -o dry.onnx --dry-run", r"^size +(.*)", r"\1"),
    Command("inspect cpu.onnx", r"^size +(.*)", r"\1"),
    Command("validate cpu.onnx", r"^fidelity: (\w+)(?:.*\n)+?.*end to end\D+([\d.]+)", r"\1, \2 dB end to end"),
    Command("bisect cpu.onnx", r"^(?:clean|found): .*"),
    Command(
        "ranges recipe.yaml -o cpu.onnx --work-dir cpu.onnx.work",
        r"^FP16 holds all \d+ tensors .*|^FP\d+.* overflows in .*|^\d+ of \d+ tensors leave .*",
        leaves=("cpu.onnx.work/ranges.cpu.json", "cpu.onnx.work/ranges.cpu.json.seal"),
    ),
    Command(
        f"embed recipe.yaml --prompts {_CAPTIONS} -o embedded.safetensors",
        r"^wrote .*: (.*)",
        r"\1",
        leaves=("embedded.safetensors",),
    ),
    Command(f'sample cpu.onnx -o cat.png --prompt "{_TEXTS[0]}" {_DRAWING}', r"^written .*", leaves=("cat.png",)),
    Command(
        f"sample cpu.onnx -o samples {_DRAWING} --compare",
        r"^(PSNR|SNR) +(.*)",
        r"\1: \2",
        leaves=("samples",),
    ),
    Command(
        f"evaluate cpu.onnx --prompts {_CAPTIONS} --embeddings embedded.safetensors -o quality {_DRAWING} "
        "--metrics psnr,ssim",
        r"^ *cpu\.onnx +(\S+) +(\S+)",
        r"PSNR \1 dB, SSIM \2",
        leaves=("quality",),
    ),
    Command(
        "recipe.yaml -o small.bundle --target rtx-sm89",
        r"^wrote \S+ \((.*)\)",
        r"validated; \1",
        leaves=("small.bundle", "small.work"),
        used_up=("small.work",),
    ),
    Command("validate small.bundle", r"rtx-sm89\D+([\d.]+)\D+([\d.]+)", r"\1 dB, \2 dB are asked for"),
    Command(
        "build small.bundle -o engine.plan",
        r"^engine +\S+ \((.*)\)",
        r"\1",
        leaves=("engine.plan", "engine.timing.cache", "engine.layers.json"),
        used_up=("small.bundle", "engine.plan"),
    ),
    Command(
        "cpu.onnx.work/exported.cpu.onnx -o again.onnx",
        r"^SNR +(.*)",
        r"\1",
        leaves=("again.onnx", "again.work", "again.onnx.origin.json"),
        used_up=("again.onnx", "again.work"),
    ),
)


@click.command(help=__doc__)
@click.option(
    "--model",
    "name",
    type=click.Choice(list(PIPELINES)),
    default="pixart",
    show_default=True,
    help="The published model's shape.",
)
@click.option("--blocks", type=click.IntRange(1), help="Transformer blocks, instead of the published number.")
@click.option(
    "--text-encoder-layers",
    "layers",
    type=click.IntRange(1, TEXT_ENCODER_LAYERS),
    default=2,
    show_default=True,
    help=f"Of each text encoder; the published ones have {TEXT_ENCODER_LAYERS}.",
)
def main(name: str, blocks: int | None, layers: int) -> None:
    """Make what is missing, run the commands, and write or print the section."""
    count = blocks or MODELS[name].blocks
    folder = made_folder(name, count)
    layers = prepare(name, folder, layers)
    uses = [measured(command, folder, number) for number, command in enumerate(COMMANDS)]
    section = markdown(name, count, layers, uses)
    if blocks is None:
        replace_section(PAGE, f"full size commands: {name}", section)
    else:
        click.echo(section)


def prepare(name: str, folder: Path, layers: int) -> int:
    """Make what the commands read in `folder`, unless it is there, and remove what earlier ones left.

    Returns the layers of the text encoders: where the disk has no room for others, of those that are there, or 0.
    """
    click.echo(f"making what is missing in {folder}", err=True)
    remove(folder, (_LOGS, *(name for command in COMMANDS for name in command.leaves)))
    (folder / _LOGS).mkdir()
    model, shape = folder / "model", PIPELINES[name]
    needed = _ROOM * weight_bytes(folder)
    if shape.text_encoder_layers(model) != layers:
        needed += shape.text_encoder_bytes(layers)
    free = shutil.disk_usage(folder).free
    if free < needed:
        click.echo(
            f"{folder}: {free / GB:.1f} of {needed / GB:.1f} GB are free: no other text encoder is made", err=True
        )
        layers = shape.text_encoder_layers(model)
    subprocess.run([sys.executable, "-m", "tools.full_size_pipeline", name, str(model), str(layers)], check=True)
    if not (folder / "cpu.onnx").is_file():
        measured_export(folder, "cpu")
    write_text_atomically(folder / _CAPTIONS, "\n".join(_TEXTS) + "\n")
    return layers


def measured(command: Command, folder: Path, number: int) -> CommandUse:
    """Run a command in `folder` and watch it; its output goes to a numbered file."""
    log = folder / _LOGS / f"{number:02d}.txt"
    click.echo(f"fp4export {command.words}", err=True)
    start = time.monotonic()
    with log.open("wb") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        words = [sys.executable, "-m", "exporter", *shlex.split(command.words)]
        process = subprocess.Popen(words, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=environment)
        samples = watch(process)
    seconds = time.monotonic() - start
    gave = command.result(process.returncode, log.read_text(encoding="utf-8"))
    click.echo(f"  {seconds:.0f} s: {gave}", err=True)
    remove(folder, command.used_up)
    return CommandUse(command.words, seconds, max((size for _, size, _ in samples), default=0), gave)


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove these files and folders, as far as they are there."""
    for path in (folder / name for name in names):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def markdown(name: str, blocks: int, layers: int, uses: Sequence[CommandUse]) -> str:
    """The section: what was there, and a line per command."""
    model, texts = MODELS[name], PIPELINES[name].text_in_words.format(layers=layers)
    return "\n".join(
        [
            f"### The other commands: {model.title.partition(' (')[0]}, {blocks} of {model.blocks} blocks",
            "",
            f"Written by `python -m tools.full_size_commands --model {name} --text-encoder-layers {layers}`, in the "
            "folder that `tools.full_size` leaves: the model and its export for the cpu. Weights are random, also "
            f"those of the autoencoder and of the {texts}, in BF16. Captions: {len(_TEXTS)}. Machine: {machine()}. "
            "Seconds of the whole process; the most resident memory of it and all that it starts, files that are "
            "mapped into memory included. `ranges` finds the calibration of the export, as it does where one has just "
            "been made.",
            "",
            "| `fp4export …` | seconds | peak, GB | what it gave |",
            "|---|---|---|---|",
            *(f"| `{use.words}` | {use.seconds:.0f} | {use.peak_bytes / GB:.1f} | {use.gave} |" for use in uses),
        ]
    )


if __name__ == "__main__":
    main()
