"""`fp4export evaluate`: images that nobody draws twice, the same from one process and from two."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.cli import main
from exporter.errors import InputError
from exporter.evaluation import job
from exporter.evaluation.job import refuse_latents
from exporter.generation.pipelines import PipelineFolder
from exporter.runtime.onnxruntime_engine import providers_for
from exporter.runtime.open import default_device
from exporter.shards import Shard

PROMPTS = 5


@pytest.fixture(scope="module")
def embeddings(tiny_job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts for the tiny model."""
    tensors = load_file(tiny_job / "prompts.safetensors")
    rows = torch.arange(PROMPTS) % 2
    for name in ("prompt_embeds", "prompt_attention_mask"):
        tensors[name] = tensors[name][rows].clone()
    tensors["prompt_embeds"] += torch.arange(PROMPTS)[:, None, None] / 10
    file = tmp_path_factory.mktemp("prompts") / "five.safetensors"
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def export(tiny_export: Path, pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny export with a recipe that names the pipeline with the autoencoder."""
    folder = tmp_path_factory.mktemp("export")
    shutil.copy(tiny_export, folder)
    recipe = tiny_export.with_name("tiny.recipe.yaml").read_text()
    (folder / "tiny.recipe.yaml").write_text(
        "\n".join(f"  weights: {pipeline_folder}" if "  weights:" in line else line for line in recipe.splitlines())
    )
    return folder / tiny_export.name


def _words(export: Path, embeddings: Path, folder: Path) -> list[str]:
    settings = ["--steps", "2", "--batch", "2", "--metrics", "psnr, ssim,fid", "--quiet"]
    return ["evaluate", str(export), "--prompts", str(embeddings), "-o", str(folder), *settings]


@pytest.fixture(scope="module")
def evaluated(export: Path, embeddings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process made of five prompts."""
    folder = tmp_path_factory.mktemp("quality") / "one"
    assert main(_words(export, embeddings, folder)) == 0
    return folder


def _images(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.png"))}


def test_one_image_a_prompt_and_model(evaluated: Path) -> None:
    assert list(_images(evaluated)) == [
        f"{model}/{index:05d}.png" for model in ("original", "quantized") for index in range(PROMPTS)
    ]
    assert len(set(_images(evaluated).values())) == 2 * PROMPTS


def test_results_hold_numbers_or_reasons(evaluated: Path) -> None:
    results = json.loads((evaluated / "results.json").read_text())
    row = results["measured"]["tiny.onnx"]
    assert results["images"] == PROMPTS
    assert 10 < row["psnr"]["value"] < 80
    assert 0 < row["ssim"]["value"] <= 1
    assert row["fid"] == {"value": None, "not_computed": "it needs real images: --reference-images DIR"}
    assert list(results["measured"]["original"]) == ["fid"]
    assert "| **tiny.onnx** |" in (evaluated / "results.md").read_text()


def test_two_processes_of_torchrun_draw_the_same_bytes(
    export: Path, embeddings: Path, evaluated: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    subprocess.run([*launcher, "-m", "exporter", *_words(export, embeddings, folder)], check=True, timeout=300)
    assert _images(folder) == _images(evaluated)
    assert (folder / "results.json").read_bytes() == (evaluated / "results.json").read_bytes()


def test_finished_images_are_kept_and_missing_ones_drawn_the_same(
    export: Path, embeddings: Path, evaluated: Path
) -> None:
    before = _images(evaluated)
    kept = evaluated / "quantized" / "00000.png"
    stamp = kept.stat().st_mtime_ns
    (evaluated / "quantized" / "00003.png").unlink()
    (evaluated / "original" / "00004.png").unlink()
    assert main(_words(export, embeddings, evaluated)) == 0
    assert _images(evaluated) == before
    assert kept.stat().st_mtime_ns == stamp


def test_folder_of_other_images_is_refused(
    export: Path, embeddings: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*_words(export, embeddings, evaluated), "--guidance", "2"]) == 2
    assert "holds images drawn with another guidance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "deepcompressor"], "holds 5 prompts, but preset deepcompressor draws from MJHQ-30K's"),
        (["--metrics", "psnr,fit"], "unknown metric 'fit'; did you mean 'fid'"),
        (["--reference-images", "nowhere"], "nowhere: no such folder"),
        (["--guidance", "nan"], "--guidance': 'nan' is no finite number"),
        (["--python", "hpsv2"], "expected METRIC=PATH"),
        (["--python", "fid=python"], "'fid' runs in no process of its own"),
    ],
)
def test_bad_words(
    export: Path,
    embeddings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert main([*_words(export, embeddings, tmp_path / "q"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_texts_need_embeddings_or_encoders(
    export: Path, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"prompt {index}" for index in range(PROMPTS)))
    words = _words(export, tmp_path / "list.txt", tmp_path / "q")
    assert main(words) == 2
    assert "holds no text encoder" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
    assert main([*words, "--embeddings", str(embeddings), "--count", "2"]) == 0
    assert len(_images(tmp_path / "q")) == 4
    assert main([*words, "--embeddings", str(embeddings), "--count", "3"]) == 2
    assert "drawn with another count" in capsys.readouterr().err


def test_images_of_another_pipeline_are_not_kept(
    export: Path,
    embeddings: Path,
    evaluated: Path,
    pipeline_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pipeline_folder, other)
    assert main([*_words(export, embeddings, evaluated), "--pipeline", str(other)]) == 2
    assert "holds images drawn with another pipeline" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_images_of_weights_that_were_replaced_are_not_kept(
    export: Path,
    embeddings: Path,
    evaluated: Path,
    pipeline_folder: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
) -> None:
    file = pipeline_folder / part / "diffusion_pytorch_model.safetensors"
    right = file.read_bytes()
    file.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    try:
        assert main(_words(export, embeddings, evaluated)) == 2
    finally:
        file.write_bytes(right)
    assert "holds images drawn with another pipeline_sha256" in capsys.readouterr().err


def test_images_of_nobody_knows_what_are_not_adopted(
    export: Path, embeddings: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in ("original", "quantized"):
        shutil.copytree(evaluated / model, tmp_path / "q" / model)
    assert main(_words(export, embeddings, tmp_path / "q")) == 2
    assert "holds images, but no settings.json that says what they are of" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "q").iterdir()) == ["original", "quantized"]


def test_a_file_is_no_folder_for_images(
    export: Path, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q").write_text("")
    assert main(_words(export, embeddings, tmp_path / "q")) == 2
    assert f"error: {tmp_path / 'q'}: is a file; give a folder for the images" in capsys.readouterr().err


def test_every_process_has_its_own_gpu() -> None:
    second = Shard(rank=5, world=8, local_rank=1)
    assert [second.device(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    assert Shard().device("cuda") == "cuda"
    assert second.device(default_device(Path("sigma.plan"))) == "cuda:1"
    assert default_device(Path("sigma.onnx")) == "cpu"
    providers = providers_for(torch.device(second.device("cuda")))
    assert providers == (("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"}), "CPUExecutionProvider")


def test_nonsense_ranks(
    export: Path,
    embeddings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert main(_words(export, embeddings, tmp_path / "q")) == 2
    assert "RANK is 3, but WORLD_SIZE is 1" in capsys.readouterr().err


def test_latents_that_nothing_decodes_are_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no autoencoder \(vae/\), so there are latents and no images"):
        refuse_latents(PipelineFolder(tmp_path, None), 4)
    # Pixels, and latents that are decoded.
    refuse_latents(PipelineFolder(tmp_path, None), 3)
    refuse_latents(PipelineFolder(pipeline_folder, None), 4)


def test_a_pipeline_that_ends_with_latents_is_refused_before_anything_is_drawn(
    export: Path,
    embeddings: Path,
    pipeline_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The tiny model's three channels are latents then.
    monkeypatch.setattr(job, "PIXEL_CHANNELS", (1,))
    shutil.copytree(pipeline_folder, tmp_path / "pipeline", ignore=shutil.ignore_patterns("vae"))
    words = [*_words(export, embeddings, tmp_path / "quality"), "--pipeline", str(tmp_path / "pipeline")]
    assert main(words) == 2
    assert "has no autoencoder (vae/)" in capsys.readouterr().err
    assert not _images(tmp_path / "quality")
