"""Trajectories are those of diffusers' own pipelines: inputs, guidance, scheduler steps and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
)
from safetensors.torch import save_file
from torch import Tensor

from exporter.models.adapter import Adapter
from exporter.models.dit import DiTAdapter
from exporter.models.hunyuan import HunyuanAdapter
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts, class_prompts, load_prompts
from exporter.sampling import make_scheduler, sample
from tests.exporter.models.small_families import (
    HUNYUAN_KEYS,
    PIXART_KEYS,
    dit,
    hunyuan,
    pixart,
    prompt_tensors,
    strengthen,
)

STEPS, GUIDANCE, SEED = 3, 4.0, 11


def vae() -> AutoencoderKL:
    torch.manual_seed(4)
    # Three halvings: a pixel of the latent is 8 x 8 pixels, as the families' own autoencoders have it.
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=3,
        norm_num_groups=2,
    ).eval()


def ours(adapter: Adapter, model: Any, prompts: Prompts, scheduler: Any, folder: Path, name: str) -> Tensor:
    """The first prompt's latent, with the scheduler's config read from where `save_pretrained` puts it."""
    scheduler.save_pretrained(folder)
    made = make_scheduler(name, folder / "scheduler_config.json", STEPS, adapter.training_noise)
    shape = adapter.latent_shape(model)
    return sample(
        lambda inputs: adapter.predict_noise(model, inputs),
        prompts,
        torch.tensor([0]),
        made,
        steps=STEPS,
        guidance=GUIDANCE,
        seed=SEED,
        latent_shape=shape,
    )


def loaded(adapter: Adapter, model: Any, tensors: dict[str, Tensor], folder: Path) -> Prompts:
    save_file(tensors, folder / "prompts.safetensors")
    return load_prompts(folder / "prompts.safetensors", adapter.conditions(model))


@pytest.mark.parametrize("sizes", [True, False], ids=["1.1", "1.2"])
def test_hunyuan(tmp_path: Path, sizes: bool) -> None:
    model, tensors = hunyuan(sizes=sizes), prompt_tensors(HUNYUAN_KEYS)
    strengthen(model)
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.03,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    pipe = HunyuanDiTPipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=model,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    given = {name: tensor[:1] for name, tensor in tensors.items()}
    expected = pipe(
        **given,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(SEED)],
        use_resolution_binning=False,
        output_type="latent",
        return_dict=False,
    )[0]
    adapter = HunyuanAdapter()
    prompts = loaded(adapter, model, tensors, tmp_path)
    found = ours(adapter, model, prompts, scheduler, tmp_path / "scheduler", "DDPMScheduler")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_dit(tmp_path: Path) -> None:
    model, autoencoder = dit(), vae()
    strengthen(model)
    # The pipeline's "no class" is 1000 whatever the model, so this one has as many classes.
    scheduler = DDIMScheduler(clip_sample=False)
    model.register_to_config(num_embeds_ada_norm=1000)
    for block in model.transformer_blocks:
        torch.manual_seed(5)
        block.norm1.emb.class_embedder.embedding_table = torch.nn.Embedding(1001, 64)
    pipe = DiTPipeline(model, autoencoder, scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(SEED)]
    expected = pipe(
        class_labels=[207],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=generator,
        output_type="pt",
    ).images
    adapter = DiTAdapter()
    prompts = class_prompts(adapter.conditions(model)[0], [207], adapter.negative_label(model))
    latent = ours(adapter, model, prompts, scheduler, tmp_path, "DDIMScheduler")
    with torch.no_grad():
        images = autoencoder.decode(latent / autoencoder.config.scaling_factor).sample
    torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [True, False], ids=["1024", "smaller"])
def test_pixart(tmp_path: Path, sizes: bool) -> None:
    model, tensors = pixart(sizes=sizes), prompt_tensors(PIXART_KEYS)
    strengthen(model)
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", prediction_type="epsilon"
    )
    pipe = PixArtAlphaPipeline(tokenizer=None, text_encoder=None, vae=vae(), transformer=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        negative_prompt=None,
        **{name: tensor[:1] for name, tensor in tensors.items()},
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(SEED)],
        height=8 * model.config.sample_size,
        width=8 * model.config.sample_size,
        use_resolution_binning=False,
        output_type="latent",
        return_dict=False,
    )[0]
    adapter = PixArtAdapter()
    prompts = loaded(adapter, model, tensors, tmp_path)
    found = ours(adapter, model, prompts, scheduler, tmp_path / "scheduler", "DPMSolverMultistepScheduler")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
