"""What names the work folder's files: all that decides them, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from exporter.job import open_job
from exporter.progress import NullProgress
from exporter.recipe import load_recipe
from exporter.source import load_source
from exporter.stage_files import balance_file, captured_file, low_rank_file, weights_file

Files = Callable[..., dict[str, str]]
LOW_RANK = 'layers=[{match: "*.ff.net.2", group: 32, low_rank: 4}, {match: "transformer_blocks.*", group: 32}]'
INPUTS = "model.family=generic", "calibration.prompts=generic.safetensors"


@pytest.fixture
def files(tiny_job: Path, tmp_path: Path) -> Files:
    """Names of the files of the recipe with some changes, of what is there before anything is calibrated."""
    folder = shutil.copytree(tiny_job, tmp_path / "job")
    prompts = load_file(folder / "prompts.safetensors")
    names = {"prompt_embeds": "encoder_hidden_states", "prompt_attention_mask": "encoder_attention_mask"}
    generic = {
        f"{sign}{name}": prompts[f"{'negative_' if sign else ''}{other}"].float()
        for sign in ("", "negative_")
        for other, name in names.items()
    }
    save_file(generic, folder / "generic.safetensors")

    def files(*changes: str) -> dict[str, str]:
        if INPUTS[0] in changes:
            _without_learned_variance(folder / "model")
        recipe = load_recipe(folder / "tiny.yaml", changes, "cpu")
        job = open_job(recipe, tmp_path / "x.onnx", None, fresh=False, keep_graphs=False, progress=NullProgress())
        source = load_source(job)
        found = [captured_file(job, source), balance_file(job, source), low_rank_file(job, source)]
        if not any(found[1:]):
            found.append(weights_file(job, source))
        return {file.name.partition(".")[0]: file.name for file in found if file is not None}

    return files


def _without_learned_variance(model: Path) -> None:
    """A transformer that family generic takes: without a variance, with a scheduler's config beside it."""
    config = PixArtTransformer2DModel.load_config(model / "transformer")
    PixArtTransformer2DModel.from_config({**config, "out_channels": 3}).save_pretrained(model / "transformer")
    DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.02).save_pretrained(model / "scheduler")


@pytest.mark.parametrize(
    "change", ["model.resolution=5", "calibration.seed=1", "calibration.steps=2", "calibration.guidance=2"]
)
def test_what_decides_captured_inputs_names_everything(change: str, files: Files) -> None:
    for changes in ((), (LOW_RANK, "method.balance=true")):
        plain, changed = files(*changes), files(*changes, change)
        assert plain.keys() == changed.keys()
        assert not set(plain.values()) & set(changed.values())


def test_branches_of_a_model_that_is_not_balanced_depend_on_no_inputs(files: Files) -> None:
    assert files(LOW_RANK)["low_rank"] == files(LOW_RANK, "calibration.seed=1")["low_rank"]


@pytest.mark.parametrize(
    "change",
    ["method.scale_search=absmax", "preset=w4a8", "layers.0.weight=e1m2", "method.step_weights=trajectory"],
)
def test_what_decides_weights_alone_names_these(change: str, files: Files) -> None:
    plain, changed = files(), files(change)
    assert plain["calibration"] == changed["calibration"]
    assert plain["quantized"] != changed["quantized"]


def test_the_same_settings_in_other_words_have_the_same_files(files: Files) -> None:
    spelled_out = files("method.iterations=250", "method.start=gptq", "method.learning_rate=0.01")
    assert files("method.iterations=250", "method.effort=default", "method.balance=false") == spelled_out
    assert "quantized" in spelled_out
    assert files("calibration.memory=1", "calibration.device=cpu", "calibration.every=1") == files()


def test_what_a_generic_model_is_told_names_everything(files: Files) -> None:
    """Inputs that it is not given are no inputs of the traced graph either."""
    embeddings, mask = "encoder_hidden_states: [6, 20]", "encoder_attention_mask: [6]"
    found = [
        files(*INPUTS, f"model.inputs={{{inputs}}}", *blocks)
        for inputs in (embeddings, f"{embeddings}, {mask}")
        for blocks in ((), ("model.blocks=transformer_blocks",))
    ]
    names = [name for one in found for name in one.values()]
    assert len(set(names)) == len(names) == 8
