"""Pipeline folders of full size with random weights, as diffusers' `save_pretrained` writes them, and their recipes.

Run as a process of its own (`python -m tools.full_size_models MODEL BLOCKS FOLDER`), so that what making a model takes
is gone before anything is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.files import atomic_path, write_text_atomically
from exporter.models.adapter import LINEAR_NOISE

TRANSFORMER = Path("model", "transformer")
_SCHEDULER = Path("model", "scheduler")
_SHARD = "1GB"
# Some input channels of trained weights are a few times larger than others.
_CHANNEL_SPREAD = 0.4
_PROMPTS = 2

_RECIPE = """\
model: {{family: {family}, weights: model, resolution: {resolution}}}
preset: w4a6
layers: {layers}
calibration: {{prompts: prompts.safetensors, steps: 1, samples: 1}}
method: {{name: rtn, scale_search: absmax}}
evaluation: {{trajectories: 1, grid: 1}}
"""


@dataclass(frozen=True)
class FullSize:
    """A published model's shape: diffusers' class and config, the config of its noise schedule, what its prompt file
    holds ([P, S, D] each), and the rules of its shipped recipe, as YAML."""

    title: str
    family: str
    class_name: str
    config: Mapping[str, Any]
    noise: Mapping[str, Any]
    resolution: int
    prompts: Mapping[str, tuple[int, int]]
    recipe_in_words: str
    most_seconds: int
    most_bytes: float
    layers: str = "[]"

    @property
    def blocks(self) -> int:
        """How many transformer blocks the published model has."""
        return int(self.config["num_layers"])


MODELS: Mapping[str, FullSize] = MappingProxyType(
    {
        "pixart": FullSize(
            title="PixArt-α (0.61 B), 256 × 256",
            family="pixart",
            class_name="PixArtTransformer2DModel",
            config=MappingProxyType(
                {
                    "sample_size": 32,
                    "num_layers": 28,
                    "patch_size": 2,
                    "in_channels": 4,
                    "out_channels": 8,
                    "num_attention_heads": 16,
                    "attention_head_dim": 72,
                    "cross_attention_dim": 1152,
                    "caption_channels": 4096,
                    "use_additional_conditions": False,
                }
            ),
            noise=LINEAR_NOISE,
            resolution=32,
            prompts=MappingProxyType({"": (120, 4096)}),
            recipe_in_words="256 tokens × 2 (guidance), 120 caption tokens",
            most_seconds=150,
            most_bytes=2.0 * 2.44e9,
        ),
        "hunyuan": FullSize(
            title="Hunyuan-DiT 1.2 (1.5 B), at 256 × 256",
            family="hunyuan",
            class_name="HunyuanDiT2DModel",
            config=MappingProxyType(
                {
                    "num_attention_heads": 16,
                    "attention_head_dim": 88,
                    "hidden_size": 1408,
                    "num_layers": 40,
                    "patch_size": 2,
                    "in_channels": 4,
                    "sample_size": 128,
                    "mlp_ratio": 4.3637,
                    "use_style_cond_and_image_meta_size": False,
                }
            ),
            noise=MappingProxyType(
                {
                    "beta_start": 0.00085,
                    "beta_end": 0.018,
                    "beta_schedule": "scaled_linear",
                    "prediction_type": "v_prediction",
                }
            ),
            resolution=32,
            prompts=MappingProxyType({"": (77, 1024), "_2": (256, 2048)}),
            recipe_in_words="256 tokens × 2 (guidance), 77 CLIP and 256 T5 tokens, `text_embedder` in INT8 as in the "
            "shipped recipe",
            most_seconds=400,
            most_bytes=16 * 2.0**30,
            layers='[{match: "text_embedder.*", weight: int8, group: 0, activation: none}]',
        ),
    }
)


def make_model(model: FullSize, blocks: int, folder: Path) -> None:
    """Write `folder`/model (a pipeline's folder), prompts.safetensors and recipe.yaml, unless they are there."""
    import diffusers

    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        (folder / TRANSFORMER).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / TRANSFORMER) as directory:
            transformer: Any = random_transformer(model, blocks)
            transformer.save_pretrained(directory, max_shard_size=_SHARD)
        diffusers.DDPMScheduler(**model.noise).save_pretrained(folder / _SCHEDULER)
        save_file(random_prompts(model), folder / "prompts.safetensors")
        write_text_atomically(
            recipe, _RECIPE.format(family=model.family, layers=model.layers, resolution=model.resolution)
        )


def random_transformer(model: FullSize, blocks: int, seed: int = 0) -> nn.Module:
    """The model with `blocks` blocks and random weights in float32; every linear layer's input channels differ."""
    import diffusers

    torch.manual_seed(seed)
    transformer: nn.Module = getattr(diffusers, model.class_name)(**{**model.config, "num_layers": blocks})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in transformer.modules():
            if isinstance(module, nn.Linear):
                gains = torch.exp(_CHANNEL_SPREAD * torch.randn(module.in_features, generator=generator))
                module.weight.mul_(gains)
    return transformer.eval()


def random_prompts(model: FullSize, seed: int = 0) -> dict[str, Tensor]:
    """Embeddings of a few prompts and a negative one, padded to the text encoders' lengths."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for suffix, (tokens, width) in model.prompts.items():
        for prefix, count in (("", _PROMPTS), ("negative_", 1)):
            lengths = torch.randint(4, tokens, (count, 1), generator=generator)
            embeds = torch.randn(count, tokens, width, generator=generator)
            tensors[f"{prefix}prompt_embeds{suffix}"] = embeds
            tensors[f"{prefix}prompt_attention_mask{suffix}"] = (torch.arange(tokens) < lengths).float()
    return tensors


if __name__ == "__main__":
    make_model(MODELS[sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3]))
