"""Train and measure the digits model that `recipes/digits` ships.

A small PixArt transformer learns scikit-learn's 8x8 digits by noise prediction; a small classifier judges
what it draws. `python tools/train_digits.py --output recipes/digits` retrains everything (about 15 minutes on
two CPU cores), `--evaluate-only` measures the files that are there.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import diffusers
import onnx
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from digits.captions import Captions, make_captions
from digits.classifier import classifier_onnx, recognised_share, train_classifier
from digits.dataset import DIGITS, load_split
from digits.denoiser import held_out_error, make_scheduler, make_transformer, train_denoiser
from digits.guided_sampling import GUIDANCE, INFERENCE_STEPS, picture, sample_digits
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file, save_file


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Return the options in `words`, by default those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write, or to evaluate")
    add("--evaluate-only", action="store_true", help="measure the files in --output, train nothing")
    add("--steps", type=int, default=3000, help="training steps of the denoiser")
    add("--classifier-epochs", type=int, default=60, help="epochs of the classifier")
    add("--samples", type=int, default=1000, help="samples to draw, a multiple of 10")
    add("--guidance", type=float, default=GUIDANCE, help="guidance scale of the samples")
    add("--seed", type=int, default=0, help="seed of data split, training and samples")
    add("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(words)
    if options.samples < DIGITS or options.samples % DIGITS:
        parser.error(f"--samples {options.samples}: needs a positive multiple of {DIGITS}, one share per digit")
    if min(options.steps, options.classifier_epochs, options.threads) < 1:
        parser.error("--steps, --classifier-epochs and --threads must be at least 1")
    if options.evaluate_only and not options.output.is_dir():
        parser.error(f"--output {options.output}: no such folder to evaluate")
    return options


def train(folder: Path, options: argparse.Namespace, progress: Progress) -> None:
    """Train captions, classifier and denoiser and write them into `folder`."""
    training, _ = load_split(options.seed)
    captions = make_captions(options.seed)
    save_file(captions.tensors(), folder / "prompts.safetensors")
    network = train_classifier(training, options.classifier_epochs, options.seed, progress)
    onnx.save(classifier_onnx(network), folder / "classifier.onnx")
    make_scheduler().save_pretrained(folder / "scheduler")
    untrained = make_transformer(options.seed)
    transformer = train_denoiser(untrained, training, captions, options.steps, options.seed, progress)
    transformer.half().save_pretrained(folder / "transformer")
    write_model_index(folder / "model_index.json")


def write_model_index(path: Path) -> None:
    """Write what makes the folder a diffusers pipeline: its parts, none for text encoder and VAE."""
    absent = {part: [None, None] for part in ("text_encoder", "tokenizer", "vae")}
    index = {
        "_class_name": "PixArtAlphaPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", DPMSolverMultistepScheduler.__name__],
        "transformer": ["diffusers", PixArtTransformer2DModel.__name__],
    }
    path.write_text(json.dumps(index | absent, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def evaluate(folder: Path, options: argparse.Namespace, progress: Progress) -> Image.Image:
    """Print the figures of the files in `folder` and return a picture of the samples."""
    _, held_out = load_split(options.seed)
    captions = Captions.from_tensors(load_file(folder / "prompts.safetensors"))
    stored = PixArtTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)
    transformer = stored.float()
    scheduler = DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler")
    classifier = folder / "classifier.onnx"
    accuracy = recognised_share(classifier, held_out.images, held_out.labels)
    error = held_out_error(transformer, held_out, captions, options.seed)
    labels = torch.arange(DIGITS).repeat_interleave(options.samples // DIGITS)
    # Not the seed that the training drew its noise from.
    seed = options.seed + 1
    images = sample_digits(transformer, scheduler, captions, labels, options.guidance, seed, progress)
    recognised = recognised_share(classifier, images, labels)
    progress.console.print(
        f"classifier: {accuracy:.2%} of {len(held_out)} held-out digits recognised\n"
        f"denoiser: mean squared noise-prediction error {error:.4f} on held-out digits\n"
        f"samples: {recognised:.2%} of {len(labels)} recognised as the digit asked "
        f"({INFERENCE_STEPS} steps, guidance {options.guidance:g})",
        highlight=False,
    )
    return picture(images, labels)


def publish(staged: Path, output: Path) -> None:
    """Move every staged file to its place in `output`; each appears whole or not at all."""
    for file in sorted(path for path in staged.rglob("*") if path.is_file()):
        place = output / file.relative_to(staged)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.chmod(0o644)  # safetensors writes files that only their owner may read
        os.replace(file, place)


def main(words: Sequence[str] | None = None) -> None:
    """Train (unless only evaluating), measure and write."""
    options = parse_arguments(words)
    torch.set_num_threads(options.threads)
    with Progress() as progress:
        if options.evaluate_only:
            evaluate(options.output, options, progress)
            return
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.output, prefix=".training-") as staged:
            train(Path(staged), options, progress)
            evaluate(Path(staged), options, progress).save(Path(staged) / "samples.png", optimize=True)
            publish(Path(staged), options.output)


if __name__ == "__main__":
    main()
