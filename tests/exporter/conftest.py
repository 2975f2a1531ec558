"""A tiny random PixArt with its recipe, and what the command makes of it: shared by the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file

from exporter.cli import main

RECIPE = """
model: {weights: model}
preset: w4a6
layers:
  - {match: "*.ff.net.0.proj", weight: e3m0, scales: channel}
  - {match: "transformer_blocks.*", group: 32}
calibration: {prompts: prompts.safetensors, steps: 3, samples: 2}
method: {name: fp4dit, iterations: 6, batch_size: 4}
evaluation: {trajectories: 2, grid: 3}
"""
TOKENS, CAPTION = 6, 20


@pytest.fixture(scope="session")
def tiny_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its model and its prompts, in a folder of their own."""
    root = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    PixArtTransformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=CAPTION,
        use_additional_conditions=False,
    ).save_pretrained(root / "model" / "transformer")
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, 2:] = 0
    prompts = {
        "prompt_embeds": torch.randn(2, TOKENS, CAPTION),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": torch.randn(1, TOKENS, CAPTION),
        "negative_prompt_attention_mask": torch.ones(1, TOKENS),
    }
    save_file(prompts, root / "prompts.safetensors")
    (root / "tiny.yaml").write_text(RECIPE)
    return root


@pytest.fixture(scope="session")
def tiny_export(tiny_job: Path) -> Path:
    """The .onnx that the command made, with its graphs kept."""
    output = tiny_job / "tiny.onnx"
    assert main([str(tiny_job / "tiny.yaml"), "-o", str(output), "--keep-graphs", "--quiet"]) == 0
    return output
