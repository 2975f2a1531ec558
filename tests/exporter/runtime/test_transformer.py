"""An exported file in the place of a pipeline's transformer: same calls, same images, clear refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from exporter.errors import EnvironmentLacksError, InputError
from exporter.gate.snr import snr_db
from exporter.job import open_job
from exporter.progress import NullProgress
from exporter.quantize import load_quantized, quantize_model
from exporter.recipe import load_recipe
from exporter.runtime import EngineTransformer
from exporter.source import load_source
from exporter.transformer_config import CONFIG_KEY

STEPS = 3
GATE_HEADROOM_DB = 10


@pytest.fixture(scope="module")
def models(tiny_job: Path, tiny_export: Path) -> tuple[nn.Module, nn.Module]:
    """The original torch model and the fake-quantized one that the file was exported from."""
    progress = NullProgress()
    recipe = load_recipe(tiny_job / "tiny.yaml")
    source = load_source(open_job(recipe, tiny_export, None, fresh=False, keep_graphs=False, progress=progress))
    (weights,) = (tiny_job / "tiny.work").glob("quantized.*.safetensors")
    calibrated = load_quantized(weights, source.plan)
    return source.model, quantize_model(source.model, source.plan, calibrated.weights)


def draw(
    transformer: nn.Module, prompts: Path, guidance: float = 3.0, device: str = "cpu"
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Latents [2, 3, 4, 4], and what the transformer, which is on `device`, was called with."""
    calls: list[dict[str, Any]] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({"latents": args[0].clone(), **kwargs})

    tensors = load_file(prompts, device)
    repeated = {name: t.repeat(2, *[1] * (t.ndim - 1)) for name, t in tensors.items() if name.startswith("negative")}
    pipe = PixArtAlphaPipeline(None, None, None, transformer, DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    latents = pipe(
        prompt=None,
        negative_prompt=None,
        **{**tensors, **repeated},
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="latent",
        use_resolution_binning=False,
    ).images
    handle.remove()
    return latents, calls


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pipeline_draws_what_the_fake_quantized_model_draws(
    tiny_job: Path, tiny_export: Path, models: tuple[nn.Module, nn.Module], guidance: float
) -> None:
    original, quantized = models
    prompts = tiny_job / "prompts.safetensors"
    wanted, _ = draw(quantized, prompts, guidance)
    ours, _ = draw(EngineTransformer.load(tiny_export), prompts, guidance)
    exact, _ = draw(original, prompts, guidance)
    assert ours.shape == wanted.shape
    quantization_db = snr_db(exact.numpy(), wanted.numpy())
    assert quantization_db < 60
    assert snr_db(wanted.numpy(), ours.numpy()) >= quantization_db + GATE_HEADROOM_DB


def test_pipelines_differ_only_in_the_transformer(
    tiny_job: Path, tiny_export: Path, models: tuple[nn.Module, nn.Module]
) -> None:
    _, theirs = draw(models[0], tiny_job / "prompts.safetensors")
    _, ours = draw(EngineTransformer.load(tiny_export), tiny_job / "prompts.safetensors")
    assert len(ours) == len(theirs) == STEPS
    assert ours[0].keys() == theirs[0].keys()
    for name, value in theirs[0].items():
        assert torch.equal(ours[0][name], value) if isinstance(value, Tensor) else ours[0][name] == value
    assert [float(call["timestep"][0]) for call in ours] == [float(call["timestep"][0]) for call in theirs]


def call_of(tiny_job: Path, batch: int = 2) -> dict[str, Tensor]:
    prompts = load_file(tiny_job / "prompts.safetensors")
    return {
        "hidden_states": torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": prompts["prompt_embeds"][:batch],
        "encoder_attention_mask": prompts["prompt_attention_mask"][:batch],
        "timestep": torch.full((batch,), 500),
    }


def test_results_outlive_the_next_call(tiny_job: Path, tiny_export: Path) -> None:
    transformer = EngineTransformer.load(tiny_export, threads=1)
    call = call_of(tiny_job)
    first = transformer(**call).sample
    before = first.clone()
    second = transformer(**{**call, "timestep": torch.full((2,), 100)}, return_dict=False)[0]
    assert torch.equal(first, before)
    assert not torch.equal(first, second)
    assert torch.equal(transformer(**call).sample, first)


def test_every_shape_is_bound_once(tiny_job: Path, tiny_export: Path) -> None:
    transformer = EngineTransformer.load(tiny_export)
    buffers = set()
    for batch in (1, 2, 1, 2):
        assert transformer(**call_of(tiny_job, batch)).sample.shape == (batch, 6, 4, 4)
        buffers.add(frozenset(bound.output.data_ptr() for bound in transformer.engine._bound.values()))
    assert len(transformer.engine._bound) == 2
    assert len(buffers) == 2


def test_types_follow_the_latents(tiny_job: Path, tiny_export: Path) -> None:
    call = call_of(tiny_job)
    transformer = EngineTransformer.load(tiny_export)
    half = transformer(**{**call, "hidden_states": call["hidden_states"].half()}).sample
    assert half.dtype == torch.float16
    assert (transformer.dtype, transformer.device) == (torch.float32, torch.device("cpu"))
    assert list(transformer.parameters()) == []
    assert transformer.to("meta").device == torch.device("cpu")


def test_config_has_diffusers_defaults(tiny_export: Path) -> None:
    transformer = EngineTransformer.load(tiny_export)
    assert transformer.config.sample_size == 4
    assert transformer.config.norm_type == "ada_norm_single"
    assert (transformer.num_heads, transformer.inner_dim, transformer.text_tokens) == (2, 64, 6)


def test_inputs_that_the_engine_does_not_have(tiny_job: Path, tiny_export: Path) -> None:
    transformer = EngineTransformer.load(tiny_export)
    call = call_of(tiny_job)
    ignored = {"added_cond_kwargs": {"resolution": torch.ones(2, 2), "aspect_ratio": None}}
    assert torch.equal(transformer(**call, **ignored).sample, transformer(**call).sample)
    with pytest.raises(InputError, match="no input 'attention_mask'"):
        transformer(**call, attention_mask=torch.ones(2, 16))
    with pytest.raises(InputError, match="input 'encoder_attention_mask' is missing"):
        transformer(**{name: value for name, value in call.items() if name != "encoder_attention_mask"})
    with pytest.raises(InputError, match=r"'encoder_hidden_states' must be \[batch, 6, 20\], not \[2, 6, 21\]"):
        transformer(**{**call, "encoder_hidden_states": torch.ones(2, 6, 21)})


def test_file_without_a_config_needs_the_models_folder(tiny_job: Path, tiny_export: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.onnx"
    model = onnx.load(tiny_export)
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != CONFIG_KEY}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, kept)
    onnx.save(model, bare)
    with pytest.raises(InputError, match="--model"):
        EngineTransformer.load(bare)
    assert EngineTransformer.load(bare, model=tiny_job / "model").config.sample_size == 4
    for text in ("{", "[]", '{"sample_size": 4}'):
        onnx.helper.set_model_props(model, {**kept, CONFIG_KEY: text})
        onnx.save(model, bare)
        with pytest.raises(InputError, match="export it again"):
            EngineTransformer.load(bare)
    onnx.helper.set_model_props(model, {**kept, CONFIG_KEY: '{"_class_name": "FluxScheduler"}'})
    onnx.save(model, bare)
    with pytest.raises(InputError, match="stands for 'FluxScheduler', which is no model"):
        EngineTransformer.load(bare)


def test_files_and_devices_that_do_not_work(tiny_export: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        EngineTransformer.load(tmp_path / "missing.onnx")
    shutil.copy(tiny_export, tmp_path / "renamed.bin")
    with pytest.raises(InputError, match="unknown suffix"):
        EngineTransformer.load(tmp_path / "renamed.bin")
    with pytest.raises(InputError, match="not a device"):
        EngineTransformer.load(tiny_export, device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu(tiny_export: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentLacksError, match="no GPU here; use --device cpu"):
        EngineTransformer.load(tiny_export, device="cuda")
    (tmp_path / "e.plan").write_bytes(b"anything")
    with pytest.raises(EnvironmentLacksError, match=r"export the same recipe to \.onnx"):
        EngineTransformer.load(tmp_path / "e.plan")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available")
def test_a_gpu_that_onnx_runtime_does_not_get_is_refused(tiny_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself would go on with the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(EnvironmentLacksError, match="CUDA provider does not load"):
        EngineTransformer.load(tiny_export, device="cuda")
