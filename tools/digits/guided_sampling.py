"""Guided samples from the digits transformer, and their picture."""

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from PIL import Image
from rich.progress import Progress

from digits.captions import NEGATIVE_ROW, Captions
from digits.dataset import DIGITS, IMAGE_SIDE
from digits.denoiser import predict_noise

INFERENCE_STEPS = 20
GUIDANCE = 3.0
BATCH = 100
ENLARGEMENT = 4


@torch.no_grad()
def sample_digits(
    transformer: PixArtTransformer2DModel,
    scheduler: DPMSolverMultistepScheduler,
    captions: Captions,
    labels: torch.Tensor,
    guidance: float,
    seed: int,
    progress: Progress,
) -> torch.Tensor:
    """Return one image f32[N, 1, 8, 8] per label i64[N] (classifier-free guidance, Ho & Salimans, eq. 6)."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(labels), 1, IMAGE_SIDE, IMAGE_SIDE, generator=generator)
    finished = []
    task = progress.add_task("samples", total=len(labels))
    for noise, digits in zip(start.split(BATCH), labels.split(BATCH), strict=True):
        embeds, masks = captions.rows(torch.cat([torch.full_like(digits, NEGATIVE_ROW), digits]))
        scheduler.set_timesteps(INFERENCE_STEPS)
        images = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([images, images]), timestep)
            predicted = predict_noise(transformer, both, timestep.expand(len(both)), embeds, masks)
            without, conditioned = predicted.chunk(2)
            guided = without + guidance * (conditioned - without)
            images = scheduler.step(guided, timestep, images, return_dict=False)[0]
        finished.append(images)
        progress.advance(task, len(digits))
    return torch.cat(finished)


def picture(images: torch.Tensor, labels: torch.Tensor) -> Image.Image:
    """Return a greyscale picture with one row per digit: its first ten images, each enlarged fourfold."""
    rows = [images[labels == digit][:10] for digit in range(DIGITS)]
    columns = min(len(row) for row in rows)
    cells = torch.stack([row[:columns] for row in rows])[:, :, 0]
    framed = torch.nn.functional.pad(cells, (1, 0, 1, 0), value=-1.0)
    pixels = ((framed.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    grid = pixels.permute(0, 2, 1, 3).reshape(DIGITS * (IMAGE_SIDE + 1), columns * (IMAGE_SIDE + 1))
    size = (grid.shape[1] * ENLARGEMENT, grid.shape[0] * ENLARGEMENT)
    return Image.fromarray(grid.numpy()).resize(size, Image.Resampling.NEAREST)
