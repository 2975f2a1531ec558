"""`fp4export sample`: pictures from an exported transformer."""

from __future__ import annotations

import click

from exporter.terminal import DEBUG, GUIDANCE, QUIET, open_progress

_ABOUT = """Draw with OUT, an .onnx, .plan or .engine that fp4export wrote, in its diffusers pipeline.

Scheduler, guidance and seeds work as with the original: only the transformer is replaced. Prompts, model folder,
scheduler, steps and guidance are by default those of the recipe beside OUT (NAME.recipe.yaml). Images are made where
the pipeline's folder has an autoencoder (vae/) or the model draws pixels itself; otherwise you get latents.

\b
Examples:
  fp4export sample digits.onnx -o digits.png
  fp4export sample digits.onnx -o samples --compare --count 20
  fp4export sample pixart.onnx -o cat.png --prompt "a cat" --pipeline PixArt-XL-2-512x512
  fp4export sample pixart.plan -o latents.safetensors --prompts embeddings.safetensors

A folder gets one PNG for every image, as soon as its batch is drawn, and samples.json with its seed; image i has the
seed --seed + i and prompt i, in turn. With --compare the original is drawn, too (its weights are needed): a picture of
all pairs, with the PSNR of each.
"""


@click.command(help=_ABOUT, short_help="Draw pictures with an exported transformer.")
@click.argument("file", metavar="OUT")
@click.option("-o", "--output", required=True, metavar="DIR|PNG", help="A folder, NAME.png or NAME.safetensors.")
@click.option(
    "--prompt",
    "texts",
    multiple=True,
    metavar="TEXT",
    help="Draw this text (DiT: the class of this number); may be repeated.",
)
@click.option("--negative-prompt", "negative", default="", metavar="TEXT", help="What --prompt is guided away from.")
@click.option("--prompts", metavar="FILE", help="Prompt embeddings (safetensors), instead of the recipe's.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Images to draw (default: one a prompt, up to 16).")
@click.option("--scheduler", metavar="NAME", help="A diffusers scheduler, such as DDIMScheduler.")
@click.option("--steps", type=click.IntRange(1, 1000), metavar="N", help="Denoising steps.")
@GUIDANCE
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, metavar="N", help="Seed of the first image (default: 0)."
)
@click.option("--batch", type=click.IntRange(1), default=4, metavar="N", help="Images drawn at once (default: 4).")
@click.option("--compare", is_flag=True, help="Draw with the original, too, and show the pairs with their PSNR.")
@click.option("--pipeline", metavar="DIR", help="The original's folder in diffusers' layout, instead of the recipe's.")
@click.option("--device", metavar="DEVICE", help="cpu or cuda (default: cpu for .onnx, cuda for engines).")
@QUIET
@DEBUG
def sample(
    file: str,
    output: str,
    texts: tuple[str, ...],
    negative: str,
    prompts: str | None,
    count: int | None,
    scheduler: str | None,
    steps: int | None,
    guidance: float | None,
    seed: int,
    batch: int,
    compare: bool,
    pipeline: str | None,
    device: str | None,
    *,
    quiet: bool,
    debug: bool,
) -> None:
    """Draw with an exported transformer."""
    from pathlib import Path

    from exporter.generation.sample import SampleOptions, sample_output

    options = SampleOptions(
        prompts=Path(prompts) if prompts else None,
        texts=texts,
        negative=negative,
        count=count,
        scheduler=scheduler,
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch=batch,
        compare=compare,
        pipeline=Path(pipeline) if pipeline else None,
        device=device,
    )
    result = sample_output(Path(file), Path(output), options, open_progress(quiet=quiet))
    if quiet:
        return
    if result.decibels:
        mean = sum(result.decibels) / len(result.decibels)
        click.echo(f"{result.measure:<8} mean {mean:.1f} dB, worst {min(result.decibels):.1f} dB")
    click.echo(f"written  {result.files[0]}" + (f" and {len(result.files) - 1} more" if len(result.files) > 1 else ""))
