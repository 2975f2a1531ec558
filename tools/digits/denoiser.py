"""The small PixArt transformer: architecture, noise schedule and training."""

import copy
import math

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from rich.progress import Progress

from digits.captions import CAPTION_CHANNELS, NEGATIVE_ROW, Captions
from digits.dataset import IMAGE_SIDE, DigitImages

BATCH = 64
PEAK_LEARNING_RATE = 1e-3
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.01
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.999
GRADIENT_NORM = 1.0
REPORT_EVERY = 100
HELD_OUT_DRAWS = 8


def make_transformer(seed: int) -> PixArtTransformer2DModel:
    """Return the untrained transformer: 4 blocks of width 256 on 16 tokens, predicting the noise only."""
    torch.manual_seed(seed)
    return PixArtTransformer2DModel(
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=64,
        cross_attention_dim=256,
        caption_channels=CAPTION_CHANNELS,
        in_channels=1,
        out_channels=1,
        sample_size=IMAGE_SIDE,
        patch_size=2,
        norm_type="ada_norm_single",
        attention_bias=True,
        use_additional_conditions=False,
    )


def make_scheduler() -> DPMSolverMultistepScheduler:
    """Return the inference scheduler, whose betas are those of the training (DDPM's linear ones)."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", solver_order=2
    )


def predict_noise(
    transformer: PixArtTransformer2DModel,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    embeds: torch.Tensor,
    masks: torch.Tensor,
) -> torch.Tensor:
    """Return the predicted noise f32[B, 1, 8, 8] at timesteps [B] under captions [B, S, D], masks [B, S]."""
    return transformer(
        noisy,
        encoder_hidden_states=embeds,
        timestep=timesteps,
        encoder_attention_mask=masks,
        return_dict=False,
    )[0]


def noise_error(
    transformer: PixArtTransformer2DModel,
    schedule: DDPMScheduler,
    images: torch.Tensor,
    caption_rows: torch.Tensor,
    captions: Captions,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the mean squared noise-prediction error, one random timestep per image (DDPM, eq. 14)."""
    timesteps = torch.randint(schedule.config.num_train_timesteps, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    embeds, masks = captions.rows(caption_rows)
    noisy = schedule.add_noise(images, noise, timesteps)
    return torch.nn.functional.mse_loss(predict_noise(transformer, noisy, timesteps, embeds, masks), noise)


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at `step`: a linear warm-up, then half a cosine to zero."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Move the exponential moving average towards the model's weights, faster during the first steps."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def train_denoiser(
    transformer: PixArtTransformer2DModel,
    training: DigitImages,
    captions: Captions,
    steps: int,
    seed: int,
    progress: Progress,
) -> PixArtTransformer2DModel:
    """Train by noise prediction for `steps` steps and return the averaged weights, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    schedule = DDPMScheduler.from_config(make_scheduler().config)
    transformer.train()
    average = copy.deepcopy(transformer).eval()
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=True
    )
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    task = progress.add_task("denoiser", total=steps)
    recent = 0.0
    for step in range(steps):
        rows = torch.randint(len(training), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        caption_rows = torch.where(dropped, NEGATIVE_ROW, training.labels[rows])
        loss = noise_error(transformer, schedule, training.images[rows], caption_rows, captions, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), GRADIENT_NORM)
        optimizer.step()
        cosine.step()
        update_average(average, transformer, step)
        recent += loss.item()
        progress.advance(task)
        if (step + 1) % REPORT_EVERY == 0:
            progress.console.print(f"step {step + 1}: mean training error {recent / REPORT_EVERY:.4f}")
            recent = 0.0
    return average


@torch.no_grad()
def held_out_error(
    transformer: PixArtTransformer2DModel, held_out: DigitImages, captions: Captions, seed: int
) -> float:
    """Return the noise-prediction error on images that the denoiser was not trained on."""
    generator = torch.Generator().manual_seed(seed)
    schedule = DDPMScheduler.from_config(make_scheduler().config)
    errors = [
        noise_error(transformer, schedule, held_out.images, held_out.labels, captions, generator)
        for _ in range(HELD_OUT_DRAWS)
    ]
    return torch.stack(errors).mean().item()
