"""What the shipped recipes of Hunyuan-DiT need for activations is what they and the documents say, and fits 2 TB."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from exporter import load_recipe
from exporter.models.hunyuan import HunyuanAdapter
from exporter.recipe_file import shipped_recipes
from exporter.source import caption_tokens, kept_activations
from tests.exporter.hunyuan_config import HUNYUAN_DIT

DOCS = Path(__file__).parents[2] / "docs"
# A disk of 2 TB, a sixth of it for everything else.
ROOM = 2e12 * 5 / 6


def _estimate(name: str, *changes: str) -> int:
    recipe, adapter = load_recipe(name, changes), HunyuanAdapter()
    model = adapter.create({**HUNYUAN_DIT, "use_style_cond_and_image_meta_size": "v1_1" in name})
    captions = caption_tokens(given.random(1, 0, torch.Generator()).shape for given in adapter.conditions(model))
    return kept_activations(recipe, adapter, model, adapter.latent_shape(model, recipe.model.resolution), captions)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("hunyuan")])
def test_a_recipe_says_how_much_disk_it_takes(name: str) -> None:
    needed, inputs = _estimate(name), load_recipe(name).calibration.inputs
    assert inputs >= load_recipe("pixart_sigma_w4a6").calibration.inputs, "which has as many tokens"
    assert needed < ROOM
    for file in (shipped_recipes()[name], DOCS / "recipes.md"):
        ((terabytes, count),) = re.findall(r"up to ([\d.]+) TB for ([\d,]+) inputs", file.read_text(encoding="utf-8"))
        assert count == f"{inputs:,}"
        assert needed <= float(terabytes) * 1e12 < needed * 1.01
    assert f"{inputs:,} inputs and {needed / 1e9:,.0f} GB" in (DOCS / "scaling.md").read_text(encoding="utf-8")


def test_every_step_would_not_fit() -> None:
    assert _estimate("hunyuan_dit_v1_2_w4a6", "calibration.every=1") > 3 * ROOM
    assert _estimate("hunyuan_dit_v1_2_w4a6", "method.effort=fast") == 0
