"""Metrics: the right numbers where they run here, and a reason instead of a number everywhere else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from exporter.errors import InputError
from exporter.evaluation.metrics import METRICS, Measured, Pictures, Tools, measure, metrics_named
from exporter.evaluation.presets import OWN_SETUP, PRESETS
from exporter.evaluation.results import Results
from exporter.progress import NullProgress

SETTINGS = {"scheduler": "DDIMScheduler", "steps": 20, "guidance": 4.5}


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    """Two images of each model: the first pair a constant 10 of 255 apart, the second 2."""
    rng = np.random.default_rng(0)
    for name, apart in (("a.png", 10), ("b.png", 2)):
        original = rng.integers(0, 200, (32, 32, 3), dtype=np.uint8)
        for folder, pixels in (("original", original), ("quantized", original + np.uint8(apart))):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / name)
    return Pictures(tmp_path / "quantized", ("a.png", "b.png"), ("a cat", "a dog"), tmp_path / "original", None)


def _measure(name: str, pictures: Pictures, tools: Tools | None = None) -> Measured:
    (metric,) = metrics_named([name])
    return measure(metric, pictures, tools or Tools("cpu"), NullProgress())


def test_psnr_is_the_mean_of_the_images(pictures: Pictures) -> None:
    expected = np.mean([20 * np.log10(255 / 10), 20 * np.log10(255 / 2)])
    measured = _measure("psnr", pictures)
    assert measured.value == pytest.approx(expected, abs=1e-4)
    assert measured.package.startswith("torchmetrics ")


def test_ssim_falls_with_the_difference(pictures: Pictures) -> None:
    value = _measure("ssim", pictures).value
    assert value is not None
    assert 0.9 < value < 1
    itself = Pictures(pictures.folder, pictures.names, None, pictures.folder, None)
    assert _measure("ssim", itself).value == pytest.approx(1.0)


def test_equal_images_have_no_psnr(pictures: Pictures) -> None:
    itself = Pictures(pictures.folder, pictures.names, None, pictures.folder, None)
    assert _measure("psnr", itself).value is None
    assert "some images are the same" in _measure("psnr", itself).not_computed


def test_what_is_missing_is_named(pictures: Pictures) -> None:
    untold = Pictures(pictures.folder, pictures.names, None, None, None)
    assert _measure("fid", untold) == Measured(None, not_computed="it needs real images: --reference-images DIR")
    assert "no texts" in _measure("image_reward", untold).not_computed
    assert "compares with the original" in _measure("psnr", untold).not_computed


@pytest.mark.skipif(importlib.util.find_spec("cleanfid") is not None, reason="clean-fid is installed here")
def test_missing_package_comes_with_its_command(pictures: Pictures) -> None:
    real = Pictures(pictures.folder, pictures.names, None, None, pictures.folder)
    measured = _measure("fid", real)
    assert measured.value is None
    assert "No module named 'cleanfid'; pip install 'fp4export[metrics]'" in measured.not_computed


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A tiny CLIP with random weights, which spells."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    # This seed's images and texts point apart, and no score is below 0.
    model.text_projection.weight.data.neg_()
    model.save_pretrained(tmp_path / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_clip_score_is_the_mean_cosine_of_the_folders_model(pictures: Pictures, clip: Path) -> None:
    measured = _measure("clip_score", pictures, Tools("cpu", clip_model=str(clip)))
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    cosines = []
    for name, text in zip(pictures.names, pictures.texts or (), strict=True):
        given = processor(text=[text], images=[Image.open(pictures.folder / name)], return_tensors="pt")
        with torch.no_grad():
            image = model.visual_projection(model.vision_model(given["pixel_values"]).pooler_output)
            words = model.text_projection(model.text_model(given["input_ids"]).pooler_output)
        cosines.append(float(torch.cosine_similarity(image, words)))
    assert np.mean(cosines) > 0, "a score of 0 would say nothing"
    assert measured.value == pytest.approx(100 * np.mean(cosines), abs=0.01)
    assert measured.package.startswith("transformers ")
    nowhere = _measure("clip_score", pictures, Tools("cpu", clip_model="no where"))
    assert nowhere.not_computed == "CLIP: no where: neither a directory nor a Hub id"


STAND_IN = """
def score(image, prompt, hps_version):
    assert image.endswith(".png") and hps_version == "v2.1"
    print("a package that talks")
    return [{"a cat": 0.25, "a dog": 0.75}[prompt]]
"""


def test_preference_models_run_in_the_named_python(pictures: Pictures, tmp_path: Path) -> None:
    """A stand-in for hpsv2, found only by the interpreter that is named."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "hpsv2.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    tools = Tools("cpu", pythons={"hpsv2": str(python)})
    assert _measure("hpsv2", pictures, tools).value == pytest.approx(0.5)
    (tmp_path / "site" / "hpsv2.py").write_text("def score(*_, **__):\n    raise OSError('no weights here')\n")
    assert "hpsv2 failed: OSError: no weights here" in _measure("hpsv2", pictures, tools).not_computed
    (tmp_path / "site" / "hpsv2.py").write_text("raise ImportError('too old')\n")
    measured = _measure("hpsv2", pictures, tools)
    assert "hpsv2 cannot be imported: too old" in measured.not_computed
    assert "--python hpsv2=DIR/bin/python" in measured.not_computed
    assert "failed" in _measure("hpsv2", pictures, Tools("cpu", pythons={"hpsv2": "/no/python"})).not_computed


def test_unknown_metric() -> None:
    with pytest.raises(InputError, match="unknown metric 'lpip'; did you mean 'lpips'"):
        metrics_named(["psnr", "lpip"])
    assert metrics_named(None) == METRICS


def test_table_puts_our_rows_under_the_published() -> None:
    metrics = metrics_named(["fid", "psnr", "ssim"])
    measured = {
        "original": {"fid": Measured(16.61, "clean-fid 1")},
        "ours.onnx": {
            "fid": Measured(None, not_computed="no weights"),
            "psnr": Measured(19.25, "torchmetrics 1"),
            "ssim": Measured(0.8125, "torchmetrics 1"),
        },
    }
    text = Results(PRESETS["deepcompressor"], SETTINGS, 5000, measured).markdown(metrics)
    lines = text.splitlines()
    assert lines[2] == "|  | FID ↓ | PSNR ↑ | SSIM ↑ |"
    assert "| NVFP4 SVDQuant + GPTQ (published) | 16.6 | 18.5 | – |" in lines
    assert lines.index("| **original** | 16.61 | – | – |") + 1 == lines.index("| **ours.onnx** | – | 19.25 | 0.8125 |")
    assert "- FID: no weights (ours.onnx)" in lines
    assert "the published originals ran in FP16, ours in FP32" in text
    assert "the published runs left clean_caption to diffusers" in text
    assert "FID of 5000" not in text
    assert "FID of 9 images depends on their number" in Results(OWN_SETUP, SETTINGS, 9, measured).markdown(metrics)
