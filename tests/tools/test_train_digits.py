"""tools/train_digits.py and the model in recipes/digits that it wrote."""

import re
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from PIL import Image
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "recipes" / "digits"
WRITTEN = {
    "classifier.onnx",
    "model_index.json",
    "prompts.safetensors",
    "samples.png",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
}
TINY = ["--steps", "2", "--classifier-epochs", "1", "--samples", "10", "--threads", "1"]

Main = Callable[[Sequence[str]], None]


@pytest.fixture(scope="module")
def script() -> Iterator[dict[str, Any]]:
    """Return the script's names; thread count and random state are put back afterwards."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield runpy.run_path(str(ROOT / "tools" / "train_digits.py"))
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.fixture(scope="module")
def main(script: dict[str, Any]) -> Main:
    """Return the script's entry point, called with the command line's words."""
    return script["main"]


@pytest.fixture(scope="module")
def trained(main: Main, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that a training of two steps wrote, a card and an older file being there before."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "README.md").write_text("kept", encoding="utf-8")
    (folder / "classifier.onnx").write_text("old", encoding="utf-8")
    main(["--output", str(folder), *TINY])
    return folder


@pytest.fixture(scope="module")
def transformer() -> PixArtTransformer2DModel:
    """Return the shipped transformer in float32."""
    stored = PixArtTransformer2DModel.from_pretrained(SHIPPED / "transformer", low_cpu_mem_usage=False)
    return stored.float().eval()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the stored tensors of the transformer in `folder`."""
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def figures(text: str) -> dict[str, float]:
    """Return the percentages that the script printed, by what they measure."""
    return {name: float(share) for name, share in re.findall(r"^(\w+): ([\d.]+)% of", text, re.MULTILINE)}


def test_training_writes_the_files_and_nothing_else(trained: Path) -> None:
    written = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert written == WRITTEN | {"README.md"}
    assert {path.name for path in trained.iterdir() if path.is_dir()} == {"scheduler", "transformer"}


def test_a_training_replaces_older_files_and_leaves_others(trained: Path) -> None:
    assert (trained / "README.md").read_text(encoding="utf-8") == "kept"
    onnx.checker.check_model(onnx.load(trained / "classifier.onnx"), full_check=True)


def test_training_depends_on_the_seed_only(script: dict[str, Any]) -> None:
    training, _ = script["load_split"](0)
    captions = script["make_captions"](0)

    def weights(seed: int) -> torch.Tensor:
        untrained = script["make_transformer"](seed)
        trained = script["train_denoiser"](untrained, training, captions, 2, seed, Progress(disable=True))
        return trained.proj_out.weight

    torch.manual_seed(5)
    first = weights(0)
    torch.manual_seed(6)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_training_and_held_out_digits_are_apart(script: dict[str, Any]) -> None:
    training, held_out = script["load_split"](0)
    assert (len(training), len(held_out)) == (1437, 360)
    assert training.images.aminmax() == (-1.0, 1.0)
    nearest = torch.cdist(held_out.images.flatten(1), training.images.flatten(1)).min(dim=1).values
    assert (nearest > 0).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "25"], "--samples 25: needs a positive multiple of 10"),
        (["--samples", "0"], "--samples 0: needs a positive multiple of 10"),
        (["--steps", "0"], "must be at least 1"),
        (["--evaluate-only"], "no such folder to evaluate"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(["--output", str(tmp_path / "absent"), *words])
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "absent").exists()


@pytest.mark.slow
def test_shipped_samples_are_recognised_as_the_digit_asked(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in SHIPPED.rglob("*")}
    main(["--output", str(SHIPPED), "--evaluate-only", "--samples", "100"])
    measured = figures(capsys.readouterr().out)
    assert measured["classifier"] >= 97.0
    assert measured["samples"] >= 95.0
    assert before == {path: path.stat().st_mtime_ns for path in SHIPPED.rglob("*")}


def test_shipped_folder_is_complete_and_small() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert {path.relative_to(SHIPPED).as_posix() for path in files} == WRITTEN | {"README.md"}
    assert sum(path.stat().st_size for path in files) <= 10_000_000


def test_shipped_weights_are_finite_halves_that_load_exactly(transformer: PixArtTransformer2DModel) -> None:
    stored, loaded = weights_of(SHIPPED), transformer.state_dict()
    assert stored.keys() == loaded.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.float16, name
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor.float(), loaded[name]), name


def test_shipped_transformer_is_the_architecture_of_its_card(transformer: PixArtTransformer2DModel) -> None:
    config = transformer.config
    assert len(transformer.transformer_blocks) == config.num_layers == 4
    assert config.num_attention_heads * config.attention_head_dim == config.cross_attention_dim == 256
    assert (config.sample_size, config.patch_size) == (8, 2)
    assert (config.in_channels, config.out_channels, config.caption_channels) == (1, 1, 64)
    assert config.norm_type == "ada_norm_single"
    assert config.attention_bias
    assert not config.use_additional_conditions


def test_shipped_scheduler_has_the_betas_of_the_training() -> None:
    sampler = DPMSolverMultistepScheduler.from_pretrained(SHIPPED / "scheduler")
    training = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000)
    assert torch.equal(sampler.betas, training.betas)
    assert sampler.config.prediction_type == "epsilon"


def test_shipped_prompts_have_masked_tokens_and_one_caption_per_digit() -> None:
    with safe_open(SHIPPED / "prompts.safetensors", framework="pt") as file:
        prompts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    assert {name: tuple(tensor.shape) for name, tensor in prompts.items()} == {
        "prompt_embeds": (10, 6, 64),
        "prompt_attention_mask": (10, 6),
        "negative_prompt_embeds": (1, 6, 64),
        "negative_prompt_attention_mask": (1, 6),
        "labels": (10,),
    }
    lengths = prompts["prompt_attention_mask"].sum(dim=1)
    assert sorted(set(lengths.tolist())) == [2, 3, 4, 5, 6]
    assert prompts["labels"].dtype == torch.int64
    assert prompts["labels"].tolist() == list(range(10))


@torch.no_grad()
def test_shipped_transformer_ignores_masked_tokens_and_heeds_the_others(
    transformer: PixArtTransformer2DModel,
) -> None:
    prompts = load_file(SHIPPED / "prompts.safetensors")
    embeds, masks = prompts["prompt_embeds"][:3], prompts["prompt_attention_mask"][:3]
    noisy = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def noise(embeds: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        timesteps = torch.full((len(embeds),), 500)
        return transformer(
            noisy,
            encoder_hidden_states=embeds,
            timestep=timesteps,
            encoder_attention_mask=masks,
            return_dict=False,
        )[0]

    expected = noise(embeds, masks)
    other_padding = torch.where(masks[..., None] == 1, embeds, -embeds)
    torch.testing.assert_close(noise(other_padding, masks), expected, rtol=0, atol=1e-4)
    assert (noise(embeds, torch.ones_like(masks)) - expected).abs().max() > 1e-2
    assert (noise(embeds.flip(0), masks.flip(0)) - expected).abs().max() > 1e-1


def test_shipped_classifier_is_one_file_for_any_batch() -> None:
    model = onnx.load(SHIPPED / "classifier.onnx", load_external_data=False)
    assert model.ir_version <= 10
    assert [(opset.domain, opset.version <= 20) for opset in model.opset_import] == [("", True)]
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)
    session = ort.InferenceSession(SHIPPED / "classifier.onnx", providers=["CPUExecutionProvider"])
    images = torch.zeros(3, 1, 8, 8)
    for batch in (1, 3):
        (logits,) = session.run(["logits"], {"samples": images[:batch].numpy()})
        assert logits.shape == (batch, 10)
        assert logits.dtype == "float32"


def test_shipped_picture_shows_ten_rows_of_digits() -> None:
    picture = Image.open(SHIPPED / "samples.png")
    assert picture.mode == "L"
    assert picture.height == 10 * 9 * 4
    assert picture.getextrema() == (0, 255)
