"""Train the second model of docs/quality.md: another transformer than the digits', so that nothing is tuned to one.

Gratings under a bump, in ten orientations, as 16x16 images of two channels; six narrow blocks on 64 tokens, whose
weights begin with the long tails of Student's distribution and keep them.

`python tools/train_shapes.py --output build/shapes` takes about five minutes on two cores and writes a pipeline folder,
prompts and a recipe. The same seed gives the same files.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from digits.captions import CAPTION_CHANNELS, make_captions
from digits.dataset import DIGITS
from digits.denoiser import make_scheduler, train_denoiser
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn

SIDE = 16
IMAGES = 4000
_WAVELENGTHS = (3.0, 6.0)
_WIDTHS = (2.5, 5.0)
_DEGREES_OF_FREEDOM = 3.0
_LONGEST_TAIL = 20.0

RECIPE = """# Made by tools/train_shapes.py.
model: {family: pixart, weights: .}
preset: w4a6
calibration: {prompts: prompts.safetensors, steps: 20, guidance: 2.0, samples: 8}
method: {effort: default, balance: true}
evaluation: {trajectories: 8}
"""


@dataclass(frozen=True)
class Shapes:
    """Images f32[N, 2, 16, 16] in [-1, 1] with their orientations i64[N]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


def draw_shapes(count: int, seed: int) -> Shapes:
    """Draw gratings of random wavelength and phase (first channel) under a bump of random place and width (second)."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    labels = torch.randint(DIGITS, (count,), generator=generator)
    angle = labels.reshape(-1, 1, 1) * math.pi / DIGITS
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    along = column * angle.cos() + row * angle.sin()
    distance = (row - between(4, SIDE - 4)).square() + (column - between(4, SIDE - 4)).square()
    bump = torch.exp(-distance / (2 * between(*_WIDTHS).square()))
    grating = torch.sin(2 * math.pi * (along / between(*_WAVELENGTHS) + between(0, 1))) * bump
    return Shapes(torch.stack([grating, 2 * bump - 1], dim=1), labels)


def make_transformer(seed: int) -> PixArtTransformer2DModel:
    """Return the untrained transformer, linear weights drawn with long tails: width 128, six blocks."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        num_layers=6,
        num_attention_heads=2,
        attention_head_dim=64,
        cross_attention_dim=128,
        caption_channels=CAPTION_CHANNELS,
        in_channels=2,
        out_channels=2,
        sample_size=SIDE,
        patch_size=2,
        norm_type="ada_norm_single",
        attention_bias=True,
        use_additional_conditions=False,
    )
    student = torch.distributions.StudentT(_DEGREES_OF_FREEDOM)
    with torch.no_grad():
        for module in transformer.transformer_blocks.modules():
            if isinstance(module, nn.Linear):
                tails = student.sample(module.weight.shape).clamp(-_LONGEST_TAIL, _LONGEST_TAIL)
                module.weight.copy_(tails * (module.weight.std() / tails.std()))
    return transformer


def main(words: Sequence[str] | None = None) -> None:
    """Train and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and training")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(words)
    if min(options.steps, options.threads) < 1:
        parser.error("--steps and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    captions = make_captions(options.seed)
    with Progress() as progress:
        transformer = train_denoiser(
            make_transformer(options.seed),
            draw_shapes(IMAGES, options.seed),
            captions,
            options.steps,
            options.seed,
            progress,
        )
    options.output.mkdir(parents=True, exist_ok=True)
    transformer.save_pretrained(options.output / "transformer")
    make_scheduler().save_pretrained(options.output / "scheduler")
    save_file(captions.tensors(), options.output / "prompts.safetensors")
    (options.output / "shapes.yaml").write_text(RECIPE, encoding="utf-8")


if __name__ == "__main__":
    main()
