"""`fp4export sample`: images and latents, the comparison, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from exporter.cli import main
from exporter.generation.sample import SampleOptions, sample_output
from tests.exporter.models.small_families import hunyuan
from tests.exporter.progresses import InterruptedProgress


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def _error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["sample", *words]) == 2
    return capsys.readouterr().err


def test_folder_gets_one_image_a_prompt_from_its_own_seed(tiny_export: Path, tmp_path: Path) -> None:
    """The tiny model has three channels and no autoencoder, so its samples are pixels."""
    common = ["sample", str(tiny_export), "--steps", "2", "--quiet"]
    assert main([*common, "-o", str(tmp_path / "a"), "--count", "3", "--seed", "4", "--batch", "1"]) == 0
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "00000.png",
        "00001.png",
        "00002.png",
        "samples.json",
    ]
    facts = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert facts["images"] == [{"prompt": 0, "seed": 4}, {"prompt": 1, "seed": 5}, {"prompt": 0, "seed": 6}]
    assert (facts["steps"], facts["guidance"]) == (2, 4.5)
    # The third image by its own seed: the same prompt, drawn alone, is the same picture.
    assert main([*common, "-o", str(tmp_path / "b"), "--count", "1", "--seed", "6"]) == 0
    assert (tmp_path / "b" / "00000.png").read_bytes() == (tmp_path / "a" / "00002.png").read_bytes()
    assert not np.array_equal(_pixels(tmp_path / "a" / "00000.png"), _pixels(tmp_path / "a" / "00002.png"))


def test_what_was_drawn_before_an_interruption_is_kept(tiny_export: Path, tmp_path: Path) -> None:
    """Without samples.json, which says what all images of the folder are."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "samples.json").write_text("of an earlier run")
    options = SampleOptions(count=3, batch=1, steps=2)
    with pytest.raises(KeyboardInterrupt):
        sample_output(tiny_export, folder, options, InterruptedProgress(steps=5))
    assert sorted(file.name for file in folder.iterdir()) == ["00000.png", "00001.png"]


def test_comparison_shows_both_and_says_how_far_apart(
    tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(tiny_export), "-o", str(tmp_path / "pairs"), "--compare", "--steps", "2"]) == 0
    assert "PSNR     mean" in capsys.readouterr().out
    rows = json.loads((tmp_path / "pairs" / "samples.json").read_text())["images"]
    assert all(10 < row["db"] < 80 for row in rows)
    sheet = _pixels(tmp_path / "pairs" / "compare.png")
    ours = _pixels(tmp_path / "pairs" / "00000.png")
    tile = ours.repeat(24, axis=0).repeat(24, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet, tile.shape)[:, :, 0]
    assert any(np.array_equal(window, tile) for row in windows for window in row)


def test_autoencoder_makes_images_of_latents(tiny_export: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    words = ["sample", str(tiny_export), "--pipeline", str(pipeline_folder), "--steps", "2", "--count", "1", "--quiet"]
    assert main([*words, "-o", str(tmp_path / "decoded.png")]) == 0
    assert _pixels(tmp_path / "decoded.png").shape == (8, 8, 3)


def test_tensors_as_they_are(tiny_export: Path, tmp_path: Path) -> None:
    words = ["sample", str(tiny_export), "--compare", "--steps", "2", "--guidance", "1", "--quiet"]
    assert main([*words, "-o", str(tmp_path / "t.safetensors")]) == 0
    tensors = load_file(tmp_path / "t.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "samples": (2, 3, 4, 4),
        "original": (2, 3, 4, 4),
    }
    assert not torch.equal(tensors["samples"], tensors["original"])


def test_lone_file_needs_only_a_pipeline_and_prompts(
    tiny_job: Path, tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = tmp_path / "lone.onnx"
    shutil.copy(tiny_export, lone)
    words = [str(lone), "-o", str(tmp_path / "l.png"), "--steps", "2", "--quiet"]
    assert "--pipeline DIR" in _error(capsys, *words)
    words += ["--pipeline", str(tiny_job / "model")]
    assert "nothing to draw" in _error(capsys, *words)
    assert main(["sample", *words, "--prompts", str(tiny_job / "prompts.safetensors")]) == 0
    assert (tmp_path / "l.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "x.jpg"], "expected a folder, NAME.png or NAME.safetensors"),
        (["-o", "nowhere/x.png"], "mkdir -p nowhere"),
        (["-o", "../folder.png"], "../folder.png: is a folder; give another NAME.png"),
        (["-o", "x.png", "--scheduler", "DDIMSchedular"], "did you mean 'DDIMScheduler'"),
        (["-o", "x.png", "--prompts", "none.safetensors"], "no such file"),
        (["-o", "x.png", "--prompt", "a cat"], "holds no text encoder"),
        (["-o", "x.png", "--prompt", "a cat", "--prompts", "p.safetensors"], "not both"),
        (["-o", "x.png", "--negative-prompt", "fog"], "goes with --prompt"),
        (["-o", "x.png", "--steps", "0"], "0 is not in the range"),
        (["-o", "x.png", "--seed", str(2**64 - 1)], "18446744073709551615 is not in the range"),
        (["-o", "x.png", "--guidance", "nan"], "--guidance': 'nan' is no finite number"),
        (["-o", "x.png", "--guidance", "inf"], "--guidance': 'inf' is no finite number"),
        (["-o", "x.png", "--guidance", "-1"], "-1.0 is not in the range"),
        (["-o", "x.png", "--steps", "1"], "take at least 2 steps"),
    ],
)
def test_bad_words(
    tiny_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert message in _error(capsys, str(tiny_export), *words)
    assert list(Path.cwd().iterdir()) == []


def test_prompts_that_do_not_fit(
    tiny_job: Path, tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = load_file(tiny_job / "prompts.safetensors")
    bad = {
        "must be [batch, 6, 20], not [4, 7, 20]": {
            name: torch.cat([tensor, tensor[:, :1]], dim=1) for name, tensor in good.items()
        },
        "holds neither prompt_embeds nor class_labels": {"labels": torch.zeros(2)},
        "class_labels is float32 [2]; expected integers [2]": {"class_labels": torch.tensor([1.0, 2.5])},
        "class_labels is int64 [2, 3]; expected integers [2]": {"class_labels": torch.ones(2, 3).long()},
        "prompt_attention_mask is [3, 6], but prompt_embeds has 2 rows": {
            **good,
            "prompt_attention_mask": torch.ones(3, 6),
        },
        "p.safetensors: prompt_embeds holds NaN or infinite numbers": {
            **good,
            "prompt_embeds": good["prompt_embeds"] / torch.tensor([1.0, 0.0])[:, None, None],
        },
        # Finite, but not in the model; the second image alone.
        "tiny.onnx: prompt 1, seed 1: the noise prediction is NaN or infinite in step 1 of 3; fp4export bisect": {
            **good,
            "prompt_embeds": good["prompt_embeds"] * torch.tensor([1.0, 1e38])[:, None, None],
        },
        "p.safetensors: negative_prompt_embeds is missing": {
            name: tensor for name, tensor in good.items() if not name.startswith("negative")
        },
        "holds nothing that PixArtAlphaPipeline draws from": {"class_labels": torch.arange(2)},
    }
    for message, tensors in bad.items():
        save_file(tensors, tmp_path / "p.safetensors")
        words = [str(tiny_export), "-o", str(tmp_path / "x.png"), "--prompts", str(tmp_path / "p.safetensors")]
        assert message in _error(capsys, *words, "--quiet"), message
    assert not (tmp_path / "x.png").exists()


def test_without_guidance_no_negative_prompt_is_needed(tiny_job: Path, tiny_export: Path, tmp_path: Path) -> None:
    good = load_file(tiny_job / "prompts.safetensors")
    positive = {name: tensor for name, tensor in good.items() if not name.startswith("negative")}
    save_file(positive, tmp_path / "p.safetensors")
    words = ["sample", str(tiny_export), "-o", str(tmp_path / "x.png"), "--prompts", str(tmp_path / "p.safetensors")]
    assert main([*words, "--guidance", "1", "--steps", "2", "--quiet"]) == 0


def test_a_file_of_another_model_is_not_drawn_with(
    tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hunyuan().save_pretrained(tmp_path / "other" / "transformer")
    words = [str(tiny_export), "-o", str(tmp_path / "x.png"), "--pipeline", str(tmp_path / "other"), "--quiet"]
    assert "was not exported from" in _error(capsys, *words)
    config = tmp_path / "other" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "SanaTransformer2DModel"}))
    assert "no pipeline is known for SanaTransformer2DModel" in _error(capsys, *words)


@pytest.mark.parametrize("place", ["file", "file/pictures", "file/pictures/more"])
def test_no_folder_is_made_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    """Known before anything is drawn, or even opened."""
    (tmp_path / "file").write_text("")
    error = _error(capsys, "absent.onnx", "-o", str(tmp_path / place))
    assert f"{tmp_path / 'file'}: is a file; give a folder" in error


def test_what_is_no_output_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.yaml").write_text("")
    assert "is a folder; expected an .onnx" in _error(capsys, str(tmp_path), "-o", "x.png")
    assert "unknown suffix '.yaml'" in _error(capsys, str(tmp_path / "my.yaml"), "-o", "x.png")


def test_index_that_names_other_classes(
    tiny_export: Path, pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    words = [str(tiny_export), "-o", str(tmp_path / "x.png"), "--pipeline", str(folder), "--quiet"]
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    assert "is a FluxPipeline, but PixArtTransformer2DModel works in" in _error(capsys, *words)
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["os", "system"]}))
    assert "text_encoder is os.system; expected transformers'" in _error(capsys, *words, "--prompt", "a cat")
    (folder / "model_index.json").write_text("{")
    assert "cannot be read as JSON" in _error(capsys, *words)
