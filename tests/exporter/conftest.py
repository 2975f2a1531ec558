"""A tiny random PixArt with its recipe, and what the command makes of it: shared by the end-to-end tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from safetensors.torch import save_file

from exporter.cli import main
from exporter.gate.table import GateResult
from exporter.job import open_job
from exporter.pipeline import prepare
from exporter.progress import NullProgress
from exporter.recipe import load_recipe
from tests.exporter.made_once import made_once
from tests.exporter.validated_export import Export, export_tiny_pixart, traced_pixart

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
# The tiny model's rows are too short for the presets' groups, so that its recipe has a rule with shorter ones.
NO_GROUPS_OF_128 = ("w8a8", "nvfp4", "mxfp8")
INDEX = {
    "_class_name": "PixArtSigmaPipeline",
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": [None, None],
    "tokenizer": [None, None],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


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


def preset_settings(preset: str) -> list[str]:
    """What makes the tiny recipe that of a preset, rounded to nearest: --set words."""
    changes = [f"preset={preset}", "method.name=rtn", *(["layers=[]"] if preset in NO_GROUPS_OF_128 else [])]
    return [word for change in changes for word in ("--set", change)]


@pytest.fixture(scope="session")
def tiny_export(tiny_job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The .onnx that the command made, with its graphs kept."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny_job, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("plugin*"))
        command = [str(folder / "tiny.yaml"), "-o", str(folder / "tiny.onnx"), "--keep-graphs", "--quiet"]
        assert main(command) == 0

    shutil.copytree(made_once(tmp_path_factory, "tiny", make), tiny_job, dirs_exist_ok=True)
    return tiny_job / "tiny.onnx"


@pytest.fixture(scope="session")
def begin(tiny_job: Path, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Fill a work folder with what the tiny job's stages up to the traced graph made, for a test of what comes later.

    `begin(work)` is for the recipe as it is, `begin(work, preset, target)` for one with `preset_settings`; targets
    whose containers allow the same group multipliers share their stages.
    """

    def fill(work: Path, preset: str | None = None, target: str = "cpu") -> Path:
        def make(folder: Path) -> None:
            recipe = load_recipe(tiny_job / "tiny.yaml", preset_settings(preset or "")[1::2], target)
            output, progress = folder / ("x.onnx" if target == "cpu" else "x.plan"), NullProgress()
            job = open_job(recipe, output, folder, fresh=False, keep_graphs=False, progress=progress)
            prepare(job, validate=False)

        made = tiny_export.with_name("tiny.work")
        if preset is not None:
            made = made_once(tmp_path_factory, f"{preset}.{target}", make)
        work.mkdir()
        for seal in made.glob("*.seal"):
            shutil.copy(seal, work)
            shutil.copy(seal.with_suffix(""), work)
        return work

    return fill


@pytest.fixture(scope="session")
def pipeline_folder(tiny_job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny job's transformer in a pipeline with an autoencoder that doubles the sides."""
    root = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(tiny_job / "model" / "transformer", root / "transformer")
    DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.02).save_pretrained(root / "scheduler")
    torch.manual_seed(1)
    AutoencoderKL(
        latent_channels=3,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        layers_per_block=1,
    ).save_pretrained(root / "vae")
    (root / "model_index.json").write_text(json.dumps(INDEX))
    return root


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The tiny PixArt of `validated_export`, exported."""
    folder = made_once(tmp_path_factory, "pixart", traced_pixart)
    return export_tiny_pixart(shutil.copytree(folder, tmp_path_factory.mktemp("export") / "pixart"))


@pytest.fixture(scope="session")
def gate(export: Export) -> tuple[GateResult, Path]:
    folder = export.folder / "gate"
    return export.validate(export.path("cpu"), folder), folder
