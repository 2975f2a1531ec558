"""tools/train_shapes.py: its images, its long tails, and a folder that the exporter takes."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter import load_recipe
from exporter.job import open_job
from exporter.progress import NullProgress
from exporter.source import load_source

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def script() -> Iterator[dict[str, Any]]:
    """The script's names; thread count and random state are put back afterwards."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield runpy.run_path(str(TOOLS / "train_shapes.py"))
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def test_images_are_seeded_and_within_range(script: dict[str, Any]) -> None:
    shapes, again, other = (script["draw_shapes"](50, seed) for seed in (0, 0, 1))
    assert shapes.images.shape == (50, 2, 16, 16)
    assert float(shapes.images.abs().max()) <= 1
    assert torch.equal(shapes.images, again.images)
    assert not torch.equal(shapes.images, other.images)


def test_weights_have_long_tails(script: dict[str, Any]) -> None:
    weight = script["make_transformer"](0).transformer_blocks[0].ff.net[0].proj.weight.detach()
    excess = float((weight / weight.std()).pow(4).mean()) - 3
    assert excess > 3


def test_what_it_writes_is_a_recipe_with_its_model(script: dict[str, Any], tmp_path: Path) -> None:
    script["main"](["--output", str(tmp_path), "--steps", "1", "--threads", "1"])
    recipe = load_recipe(tmp_path / "shapes.yaml", target="cpu")
    job = open_job(recipe, tmp_path / "x.onnx", None, fresh=False, keep_graphs=False, progress=NullProgress())
    source = load_source(job)
    assert source.latent_shape == (2, 16, 16)
    assert len(source.plan.layers) == 60
