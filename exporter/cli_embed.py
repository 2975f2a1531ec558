"""The command that makes a prompts file."""

from __future__ import annotations

import click

from exporter.terminal import DEBUG, QUIET, open_progress


@click.command(name="embed", short_help="Encode prompts with a pipeline's own text encoders.")
@click.argument("model", metavar="RECIPE|MODEL_DIR")
@click.option("--prompts", required=True, metavar="FILE", help="A .txt file, one prompt a line, or a .json list.")
@click.option("-o", "--output", required=True, metavar="OUT", help="The prompts file: NAME.safetensors.")
@click.option("--negative", default="", metavar="TEXT", help="What guidance leads away from (default: nothing).")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="What the encoders compute in (default: what they are stored in).",
)
@click.option(
    "--tokens",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Tokens per prompt (PixArt only; default: 120, Sigma: 300).",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=4, metavar="N", help="Prompts encoded at once (default: 4)."
)
@QUIET
@DEBUG
def embed_prompts(
    model: str,
    prompts: str,
    output: str,
    negative: str,
    dtype: str,
    tokens: int | None,
    batch_size: int,
    *,
    quiet: bool,
    debug: bool,
) -> None:
    """Encode prompts into the file that a recipe names as calibration.prompts.

    The text encoders are those in the pipeline's folder that RECIPE or MODEL_DIR names (T5 for PixArt, CLIP and mT5 for
    Hunyuan-DiT), loaded one after the other, so that an export never holds them. DiT draws class labels and needs no
    such file. Needs transformers: pip install 'fp4export[embed]'.

    \b
    Examples:
      fp4export embed pixart_alpha_w4a6 --prompts captions.txt -o prompts.safetensors
      fp4export embed path/to/HunyuanDiT --prompts captions.json -o prompts.safetensors --dtype bfloat16
    """
    from pathlib import Path

    from exporter.embed import EmbedOptions, embed

    options = EmbedOptions(negative, dtype, tokens, batch_size)
    written = embed(model, Path(prompts), Path(output), options, open_progress(quiet=quiet))
    if not quiet:
        click.echo(f"prompts  {written}")
