"""A transformer that only a recipe describes: the whole job, and why others are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporter.cli import main
from exporter.errors import InputError
from exporter.gate.snr import snr_db
from exporter.metrics import read_metrics
from exporter.models.generic import GenericAdapter
from exporter.models.loading import load_transformer
from exporter.runtime import EngineTransformer
from tests.exporter.models.small_families import T5_TOKENS, T5_WIDTH, dit, hunyuan

RECIPE = """
model:
  family: generic
  weights: model
  inputs: {encoder_hidden_states: [null, 24], encoder_attention_mask: [null]}
preset: w4a6
layers: [{match: "transformer_blocks.*", group: 32}]
calibration: {prompts: prompts.safetensors, steps: 2, samples: 2}
method: {name: fp4dit, iterations: 2, batch_size: 4}
evaluation: {trajectories: 1, grid: 2}
"""


@pytest.fixture
def sana(tmp_path: Path) -> Path:
    """A recipe for a tiny Sana, which passes its blocks' arguments by position and predicts a flow."""
    torch.manual_seed(0)
    SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=T5_WIDTH,
        sample_size=8,
        patch_size=1,
    ).save_pretrained(tmp_path / "model" / "transformer")
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    tensors = {
        f"{prefix}{name}": torch.randn(rows, T5_TOKENS, T5_WIDTH)[..., :width].squeeze(-1)
        for prefix, rows in (("", 2), ("negative_", 1))
        for name, width in (("encoder_hidden_states", T5_WIDTH), ("encoder_attention_mask", 1))
    }
    masks = {name: torch.ones_like(tensor) for name, tensor in tensors.items() if "mask" in name}
    save_file({**tensors, **masks}, tmp_path / "prompts.safetensors")
    (tmp_path / "job.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.slow
def test_the_whole_job_runs_and_the_gate_passes(sana: Path) -> None:
    assert main([str(sana / "job.yaml"), "-o", str(sana / "out.onnx"), "--quiet"]) == 0
    metrics = read_metrics(sana / "out.metrics.json")
    assert metrics["fidelity"]["passed"]
    assert metrics["quality"]["eps_snr_db_mean"] > 15
    original = load_transformer(sana / "model" / "transformer", GenericAdapter({"encoder_hidden_states": []}, None))
    drawn = [_drawn(transformer, sana) for transformer in (original, EngineTransformer.load(sana / "out.onnx"))]
    assert snr_db(*(latents.numpy() for latents in drawn)) > 15
    assert not torch.equal(*drawn)


def _drawn(transformer: nn.Module, folder: Path) -> Tensor:
    """Latents of the family's own pipeline."""
    scheduler = DPMSolverMultistepScheduler.from_pretrained(folder / "model" / "scheduler")
    pipe = SanaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    tensors = load_file(folder / "prompts.safetensors")
    keys = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    given = {
        f"{prefix}{key}": tensors[f"{prefix}{name}"][:1] for name, key in keys.items() for prefix in ("", "negative_")
    }
    side = 8 * pipe.vae_scale_factor
    latents: Tensor = pipe(
        **{"negative_prompt": None, **given},
        height=side,
        width=side,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        use_resolution_binning=False,
        output_type="latent",
        return_dict=False,
    )[0]
    return latents


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "model.inputs.encoder_hidden_state=[1]",
            "takes no 'encoder_hidden_state'; did you mean 'encoder_hidden_states'",
        ),
        ("model.inputs={encoder_attention_mask: [null]}", "also needs encoder_hidden_states"),
        ("model.blocks=blocks", "lists with linear layers here: transformer_blocks"),
        ("model.family=dit", "inputs and blocks describe a model to family generic"),
        ("model.inputs={}", "family generic needs inputs"),
        ("method.balance=true", "method.balance: of family generic it is not known"),
    ],
)
def test_what_a_recipe_gets_wrong_is_named(
    sana: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(sana / "job.yaml"), "-o", str(sana / "out.onnx"), "--dry-run", "--set", change]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_blocks_that_cannot_be_taken_apart_are_refused(tmp_path: Path) -> None:
    hunyuan(sizes=False).save_pretrained(tmp_path / "hunyuan")
    clip, t5 = [5, 32], [7, 24]
    adapter = GenericAdapter(
        {
            "encoder_hidden_states": clip,
            "text_embedding_mask": clip[:1],
            "encoder_hidden_states_t5": t5,
            "text_embedding_mask_t5": t5[:1],
        },
        None,
    )
    model = load_transformer(tmp_path / "hunyuan", adapter)
    inputs = adapter.example_inputs(model, batch=2, tokens=3)
    with pytest.raises(InputError, match=r"blocks\.3 takes other arguments than blocks\.0.*an adapter of its own"):
        adapter.check(model, inputs)


def test_only_layers_in_the_blocks_are_quantized_without_a_rule(tmp_path: Path) -> None:
    dit().save_pretrained(tmp_path / "dit")
    adapter = GenericAdapter({"class_labels": []}, None)
    model = load_transformer(tmp_path / "dit", adapter)
    assert adapter.kept_layers(model) == ("proj_out_1", "proj_out_2")
