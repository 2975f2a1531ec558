"""Every family's own pipeline draws the same with the exported graph as with the torch model it was traced from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtAlphaPipeline
from safetensors.torch import save_file
from torch import nn

from exporter.errors import InputError
from exporter.evaluation.job import EvaluateOptions, conditions_of
from exporter.gate.snr import snr_db
from exporter.generation.conditions import Embedded, Texts, read_conditions
from exporter.generation.generate import Image, Settings, fitting_batch, generate
from exporter.generation.pipelines import PIPELINES, PipelineFolder, open_pipeline
from exporter.generation.source import DrawingDefaults, DrawingSource
from exporter.models.adapter import LINEAR_NOISE
from exporter.models.dit import DiTAdapter
from exporter.models.families import ADAPTERS
from exporter.models.loading import load_transformer
from exporter.models.location import find_model
from exporter.models.pixart import PixArtAdapter
from exporter.runtime import EngineTransformer
from exporter.runtime.engine import Buffers, Engine, Shapes
from exporter.runtime.signature import TensorSpec
from exporter.to_onnx import to_onnx
from tests.exporter.models.small_families import (
    HUNYUAN_KEYS,
    PIXART_KEYS,
    SIDE,
    T5_TOKENS,
    hunyuan,
    pixart,
    prompt_tensors,
)
from tests.exporter.test_embed import pixart as pixart_with_encoder

CLASSES = 1000
"""DiTPipeline calls no class 1000, whatever the model says."""


def _dit() -> nn.Module:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        num_layers=1,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )


@pytest.mark.parametrize("family", ["hunyuan", "dit"])
def test_pipeline_of_the_family(family: str, pipeline_folder: Path, tmp_path: Path) -> None:
    model = _dit() if family == "dit" else hunyuan(blocks=2)
    for parameter in model.parameters():
        # Zero-initialised modulations would hide what they are given.
        torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    adapter = ADAPTERS[family]
    to_onnx(model, adapter, adapter.example_inputs(model, 2, T5_TOKENS), tmp_path / "m.onnx")
    tensors = {"class_labels": torch.tensor([207])} if family == "dit" else prompt_tensors(HUNYUAN_KEYS, 1)
    if family == "dit":
        # Its pipeline always decodes.
        (tmp_path / "vae").symlink_to(pipeline_folder / "vae")
    drawn = []
    for transformer in (model, EngineTransformer.load(tmp_path / "m.onnx")):
        folder = PipelineFolder(tmp_path, None)
        pipeline = open_pipeline(folder, transformer, "DPMSolverMultistepScheduler", 3, LINEAR_NOISE)
        images = [Image(0, 1), Image(0, 2)]
        conditions = Embedded(Path("test"), tensors)
        drawn.append(generate(pipeline, conditions, images, Settings(3, 4.0, (SIDE, SIDE))))
    assert drawn[0].shape == ((2, 3, 2 * SIDE, 2 * SIDE) if family == "dit" else (2, 3, SIDE, SIDE))
    # One call of the graph is 102 dB from torch's; an absolute limit would measure the latents, which reach a thousand.
    assert snr_db(drawn[0].numpy(), drawn[1].numpy()) > 90
    assert not torch.allclose(drawn[0][0], drawn[0][1], atol=1e-3)


def test_parts_that_are_stored_in_fp16_draw_with_the_original_in_fp32(tmp_path: Path) -> None:
    pixart_with_encoder(PixArtAlphaPipeline).to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    model = load_transformer(tmp_path / "transformer", PixArtAdapter(), "fp16")
    folder = PipelineFolder(tmp_path, None)
    pipeline = open_pipeline(folder, model, "DDIMScheduler", 2, LINEAR_NOISE, text=True)
    assert pipeline.text_encoder.dtype == torch.float16
    drawn = generate(pipeline, Texts(("a red fox",)), [Image(0, 1)], Settings(2, 4.0, (8, 8)))
    assert drawn.shape == (1, 3, 8, 8)
    assert bool(drawn.isfinite().all())


def test_no_picture_is_made_of_numbers_that_are_not_finite(pipeline_folder: Path, tiny_job: Path) -> None:
    """A model that loses its numbers in the second step, then an autoencoder that has none."""
    model = load_transformer(pipeline_folder / "transformer", PixArtAdapter(), None)
    folder = PipelineFolder(pipeline_folder, None)
    conditions = read_conditions(tiny_job / "prompts.safetensors")
    images, settings = [Image(1, 5), Image(0, 6)], Settings(3, 4.5, (4, 4))
    pipeline = open_pipeline(folder, model, "DDIMScheduler", 3, LINEAR_NOISE)
    assert bool(generate(pipeline, conditions, images, settings).isfinite().all())

    def lose(_module: nn.Module, _args: object, kwargs: dict[str, torch.Tensor], output: tuple[torch.Tensor]) -> None:
        # Rows: both without their prompts, then both with them.
        output[0][3, 0] += torch.where(kwargs["timestep"][0] < 500, torch.inf, 0.0)

    hook = model.register_forward_hook(lose, with_kwargs=True)
    with pytest.raises(InputError, match=r"^the original: prompt 0, seed 6: the noise prediction .* in step 2 of 3; "):
        generate(pipeline, conditions, images, settings)
    hook.remove()
    torch.nn.init.constant_(pipeline.vae.decoder.conv_out.bias, torch.nan)
    with pytest.raises(InputError, match=r"^prompt 1, seed 5: the noise predictions are finite.*autoencoder \(vae/\)"):
        generate(pipeline, conditions, images, settings)


class _Narrow(Engine):
    """The torch model, with 4 to 7 rows as the only batches, as an engine's profile may have it."""

    smallest_batch, largest_batch = 4, 7

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        names = PixArtAdapter().input_names(model)
        inputs = tuple(TensorSpec(name, None, ("batch",)) for name in names)
        super().__init__("narrow.plan", inputs, TensorSpec("sample", None, ("batch",)), torch.device("cpu"))

    def _bind(self, inputs: Shapes, output: tuple[int, ...]) -> Buffers:
        raise NotImplementedError

    def run(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        assert self.smallest_batch <= len(tensors["hidden_states"]) <= self.largest_batch
        predicted: torch.Tensor = self._model(**tensors, return_dict=False)[0]
        return predicted


def test_a_batch_too_small_for_the_engine_is_filled_up(tmp_path: Path) -> None:
    model = pixart()
    engine = _Narrow(model)
    conditions = Embedded(Path("test"), prompt_tensors(PIXART_KEYS))
    folder, images = PipelineFolder(tmp_path, None), [Image(0, 1), Image(1, 2), Image(0, 3)]
    drawn = []
    for guidance, fitting in ((4.0, (2, 3)), (1.0, (4, 7))):
        settings = Settings(2, guidance, (SIDE, SIDE))
        assert tuple(fitting_batch(wanted, engine, settings) for wanted in (1, 9)) == fitting
        for transformer in (EngineTransformer(engine, {**model.config, "_class_name": type(model).__name__}), model):
            pipeline = open_pipeline(folder, transformer, "DDIMScheduler", 2, LINEAR_NOISE)
            drawn.append(
                torch.cat([generate(pipeline, conditions, part, settings) for part in (images[:2], images[2:])])
            )
            assert len(drawn[-1]) == len(images)
        torch.testing.assert_close(drawn[-2], drawn[-1], atol=1e-3, rtol=1e-3)
    engine.smallest_batch = engine.largest_batch = 3
    with pytest.raises(InputError, match=r"narrow\.plan: takes batches of 3 to 3, and a guided image is 2"):
        fitting_batch(1, engine, Settings(2, 4.0, (SIDE, SIDE)))


def test_dit_draws_classes_by_their_numbers(tmp_path: Path) -> None:
    _dit().save_pretrained(tmp_path / "transformer")
    files = find_model(tmp_path)
    source = DrawingSource(files, PipelineFolder.of(files), DiTAdapter(), DrawingDefaults(class_count=4))
    spread, named = source.conditions(None), source.texts(["207", "3"], "", None)
    assert isinstance(named, Embedded)
    assert spread.tensors["class_labels"].tolist() == [0, 250, 500, 750]
    assert named.tensors["class_labels"].tolist() == [207, 3]
    for text in ("a cat", "1000", "-1"):
        with pytest.raises(InputError, match="family dit draws class labels, from 0 to 999"):
            source.texts([text], "", None)


@pytest.mark.parametrize("label", [1000, -1])
def test_labels_of_no_class_are_found_when_the_file_is_read(tmp_path: Path, label: int) -> None:
    _dit().save_pretrained(tmp_path / "transformer")
    files = find_model(tmp_path)
    source = DrawingSource(files, PipelineFolder.of(files), DiTAdapter(), DrawingDefaults())
    save_file({"class_labels": torch.tensor([0, 999])}, tmp_path / "right.safetensors")
    save_file({"class_labels": torch.tensor([3, label])}, tmp_path / "wrong.safetensors")
    assert source.conditions(tmp_path / "right.safetensors").labels == [0, 999]
    with pytest.raises(InputError, match=rf"wrong\.safetensors: class_labels: {label} is none of .* 1000 classes"):
        source.conditions(tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match=rf"class_labels: {label} is none of"):
        conditions_of(EvaluateOptions(tmp_path / "wrong.safetensors"), source, None)


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "EulerDiscreteScheduler"])
def test_schedulers_that_dits_pipeline_calls_wrongly(tmp_path: Path, scheduler: str) -> None:
    with pytest.raises(InputError, match=f"the noise of {scheduler}.*DDIMScheduler"):
        open_pipeline(PipelineFolder(tmp_path, None), _dit(), scheduler, 2, LINEAR_NOISE)


def test_every_family_has_a_pipeline() -> None:
    assert set(PIPELINES) == {adapter.class_name for adapter in ADAPTERS.values()}
    assert all(hasattr(diffusers, name) for names in PIPELINES.values() for name in names)


def test_transformers_of_other_classes(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    with pytest.raises(InputError, match="no pipeline is known for Linear"):
        open_pipeline(PipelineFolder(tmp_path, None), nn.Linear(1, 1), "DDIMScheduler", 2, LINEAR_NOISE)
    with pytest.raises(InputError, match="is a PixArtAlphaPipeline, but DiTTransformer2DModel works in DiTPipeline"):
        open_pipeline(PipelineFolder(tmp_path, None), _dit(), "DDIMScheduler", 2, LINEAR_NOISE)


def test_pipeline_that_always_decodes_needs_an_autoencoder(tmp_path: Path) -> None:
    pipeline = open_pipeline(PipelineFolder(tmp_path, None), _dit(), "DDIMScheduler", 2, LINEAR_NOISE)
    conditions = Embedded(Path("test"), {"class_labels": torch.tensor([1])})
    with pytest.raises(InputError, match="DiTPipeline always makes images: its folder needs vae/"):
        generate(pipeline, conditions, [Image(0, 0)], Settings(2, 4.0, (SIDE, SIDE)))
