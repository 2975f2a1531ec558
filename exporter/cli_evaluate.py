"""`fp4export evaluate`: an exported transformer's quality in published setups."""

from __future__ import annotations

import click

from exporter.terminal import DEBUG, GUIDANCE, QUIET, open_console, open_progress

_ABOUT = """Draw the images of a prompt list with the original and with the exported transformer, and compare them.

SUBJECT is an .onnx, .plan or .engine that fp4export wrote, or a recipe, which is exported to DIR first. Metrics come
from their own packages (pip install 'fp4export[metrics]'); one whose package, weights or images are missing is listed
as not computed, with the reason. A preset is a published setup: which prompts of which list, seeds, scheduler, steps,
guidance.

\b
Presets:
  fp4dit               COCO val2017, first 10,000 captions (captions_val2017.json)
  fp4dit-hpsv2         the HPSv2 benchmark's 3,200 prompts
  fp4dit-pixart        PixArt's 120 prompts
  deepcompressor       5,000 prompts of MJHQ-30K (meta_data.json); published PixArt-Sigma rows
  deepcompressor-sdci  5,000 prompts of sDCI (sDCI.yaml)

\b
Examples:
  fp4export evaluate digits.onnx --prompts recipes/digits/prompts.safetensors -o quality
  fp4export evaluate sigma.onnx --prompts meta_data.json --preset deepcompressor -o mjhq --reference-images mjhq_5000
  torchrun --nproc-per-node 8 -m exporter evaluate sigma.plan --prompts meta_data.json --preset deepcompressor -o q

Finished images are kept, so the same command goes on after an interruption. Every prompt has its own seed and a batch
is always drawn as a whole, so the number of processes changes nothing. DIR gets original/, quantized/, results.json and
results.md, where the published rows stand above yours.
"""


@click.command(help=_ABOUT, short_help="Measure an exported transformer's images in published setups.")
@click.argument("subject")
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder for the images and the results.")
@click.option("--prompts", required=True, metavar="FILE", help="Prompt list: .txt, .json, .yaml or .safetensors.")
@click.option("--preset", metavar="NAME", help="A published setup (see above).")
@click.option("--embeddings", metavar="FILE", help="The list's embeddings (safetensors), instead of text encoders.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Draw only the first N of the chosen prompts.")
@click.option("--scheduler", metavar="NAME", help="A diffusers scheduler, instead of the preset's or the recipe's.")
@click.option("--steps", type=click.IntRange(1, 1000), metavar="N", help="Denoising steps.")
@GUIDANCE
@click.option("--batch", type=click.IntRange(1), default=1, metavar="N", help="Images drawn at once (default: 1).")
@click.option("--metrics", metavar="A,B", help="Only these: fid clip_score lpips psnr ssim hpsv2 image_reward.")
@click.option("--reference-images", "references", metavar="DIR", help="Real images, for FID.")
@click.option("--pipeline", metavar="DIR", help="The original's folder in diffusers' layout, instead of the recipe's.")
@click.option("--device", metavar="DEVICE", help="cpu or cuda (default: cpu for .onnx, cuda for engines).")
@click.option(
    "--clip-model", metavar="ID|DIR", help="CLIP for the CLIP score (default: openai/clip-vit-large-patch14)."
)
@click.option(
    "--python", "pythons", multiple=True, metavar="METRIC=PATH", help="Run hpsv2 or image_reward in this Python."
)
@QUIET
@DEBUG
def evaluate(
    subject: str,
    output: str,
    prompts: str,
    preset: str | None,
    embeddings: str | None,
    count: int | None,
    scheduler: str | None,
    steps: int | None,
    guidance: float | None,
    batch: int,
    metrics: str | None,
    references: str | None,
    pipeline: str | None,
    device: str | None,
    clip_model: str | None,
    pythons: tuple[str, ...],
    *,
    quiet: bool,
    debug: bool,
) -> None:
    """Draw with both models and compare the images."""
    from pathlib import Path

    from exporter.evaluation.job import EvaluateOptions, evaluate_output
    from exporter.evaluation.metrics import CLIP_MODEL

    options = EvaluateOptions(
        prompts=Path(prompts),
        preset=preset,
        embeddings=Path(embeddings) if embeddings else None,
        count=count,
        scheduler=scheduler,
        steps=steps,
        guidance=guidance,
        batch=batch,
        metrics=tuple(name.strip() for name in metrics.split(",")) if metrics else None,
        references=Path(references) if references else None,
        pipeline=Path(pipeline) if pipeline else None,
        device=device,
        clip_model=clip_model or CLIP_MODEL,
        pythons=_interpreters(pythons),
    )
    written = evaluate_output(subject, Path(output), options, open_progress(quiet=quiet))
    if written is not None and not quiet:
        from rich.markdown import Markdown

        open_console(stderr=False).print(Markdown(written[1].read_text(encoding="utf-8")))
        click.echo(f"written  {written[0]} and {written[1]}")


def _interpreters(given: tuple[str, ...]) -> dict[str, str]:
    """METRIC=PATH options as a mapping. Raises `InputError`."""
    from exporter.errors import InputError, did_you_mean

    known = ("hpsv2", "image_reward")
    interpreters = {}
    for text in given:
        metric, equals, path = text.partition("=")
        if not equals or not path:
            raise InputError(f"--python {text}: expected METRIC=PATH, for example hpsv2=venv/bin/python")
        if metric not in known:
            raise InputError(f"--python {text}: {metric!r} runs in no process of its own{did_you_mean(metric, known)}")
        interpreters[metric] = path
    return interpreters
