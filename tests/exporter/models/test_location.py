"""Where models are found, and what is said when they are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from exporter.errors import EnvironmentLacksError, InputError
from exporter.models.location import TEXT_PARTS, find_model, locate_config, locate_model, read_config
from exporter.recipe import Recipe

HUB_ID = "somebody/pixart-xl"


def recipe_for(weights: str, folder: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None = None) -> Recipe:
    """A recipe in `folder` with these weights."""
    monkeypatch.chdir(folder)
    data = {"model": {"weights": weights, "revision": revision}, "preset": "w4a6", "calibration": {"prompts": "p"}}
    return Recipe.model_validate(data)


def write_pipeline(folder: Path) -> None:
    """A pipeline's directory with configs only."""
    for name, file in (("transformer", "config.json"), ("scheduler", "scheduler_config.json")):
        (folder / name).mkdir(parents=True)
        (folder / name / file).write_text(json.dumps({"_class_name": name}))


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub cache with nothing in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_transformer_is_found_by_itself_and_inside_a_pipeline(tmp_path: Path) -> None:
    write_pipeline(tmp_path)
    pipeline, alone = find_model(tmp_path), find_model(tmp_path / "transformer")
    assert pipeline.transformer == alone.transformer == tmp_path / "transformer"
    assert pipeline.scheduler == alone.scheduler == tmp_path / "scheduler" / "scheduler_config.json"
    (tmp_path / "transformer").rename(tmp_path / "another")
    assert find_model(tmp_path / "another").scheduler is None


def test_a_relative_directory_starts_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pipeline(tmp_path / "some" / "model")
    recipe = recipe_for("some/model", tmp_path, monkeypatch)
    assert locate_model(recipe).root == tmp_path / "some" / "model"
    found = locate_config(recipe)
    assert found.content == {"_class_name": "transformer"}
    assert "no safetensors" in (found.weights_missing or "")
    (tmp_path / "some/model/transformer/x.safetensors").write_bytes(b"")
    assert locate_config(recipe).weights_missing is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("./absent", "absent does not exist"),
        ("/absent/model", "/absent/model does not exist"),
        ("a/b/c", "a/b/c does not exist"),
        ("bad--id/x", "does not exist"),
        ("file.txt", r"file\.txt: is a file; model\.weights is the directory"),
        ("empty", r"holds neither config\.json nor transformer/config\.json"),
    ],
)
def test_a_directory_that_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, message: str
) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        locate_config(recipe_for(weights, tmp_path, monkeypatch))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"a": }', r"config\.json:2: not valid JSON"),
        (b"\xff\xfe\x00", "not a JSON text file"),
        (b"[" * 100_000, "not a JSON text file"),
        (b"[1]", "expected a JSON object"),
        (b" " * (1 << 21), "over 1 MiB"),
    ],
)
def test_a_broken_config_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_config(tmp_path)


def answering(error: Exception):
    """A stand-in for the Hub's download that fails this way."""

    def snapshot_download(*_args: object, **_kwargs: object) -> str:
        raise error

    return snapshot_download


@pytest.mark.usefixtures("empty_hub")
def test_a_hub_out_of_reach_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answering(LocalEntryNotFoundError("offline")))
    recipe = recipe_for(HUB_ID, tmp_path, monkeypatch)
    for locate in (locate_model, locate_config):
        with pytest.raises(EnvironmentLacksError, match=rf"{HUB_ID}.* cannot be reached.*--set model\.weights=DIR"):
            locate(recipe)


@pytest.mark.usefixtures("empty_hub")
def test_a_hub_s_refusal_tells_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    response: Any = SimpleNamespace(status_code=404, headers={}, request=None)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", answering(RepositoryNotFoundError("none", response=response))
    )
    with pytest.raises(EnvironmentLacksError, match="answers 404"):
        locate_model(recipe_for(HUB_ID, tmp_path, monkeypatch))


def test_of_a_hub_model_the_parts_that_are_asked_for_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot_download(
        _hub_id: str, *, revision: str | None, allow_patterns: list[str], cache_dir: str | None
    ) -> str:
        assert cache_dir is revision is None
        asked.append(allow_patterns)
        write_pipeline(tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    recipe = recipe_for(HUB_ID, tmp_path, monkeypatch)
    assert locate_model(recipe).root == tmp_path / "snapshot"
    assert not any(pattern.startswith(("vae", "text_encoder")) for pattern in asked[0])
    shutil.rmtree(tmp_path / "snapshot")
    locate_model(recipe, ("vae", *TEXT_PARTS))
    assert {"vae/*.safetensors", "text_encoder*/*.safetensors", "tokenizer*/*.model"} <= set(asked[1]) - set(asked[0])


@pytest.mark.usefixtures("empty_hub")
def test_a_repository_may_be_a_transformer_alone_and_have_revisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the Hub has is filtered as its client does it; its files are at the root."""
    there = ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]

    def snapshot_download(
        _hub_id: str, *, revision: str | None, allow_patterns: list[str], cache_dir: str | None
    ) -> str:
        folder = Path(cache_dir or tmp_path) / str(revision)
        folder.mkdir()
        for name in huggingface_hub.utils.filter_repo_objects(there, allow_patterns=allow_patterns):
            (folder / name).write_text("{}")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    recipe = recipe_for(HUB_ID, tmp_path, monkeypatch, revision="v2")
    assert str(locate_config(recipe).file) == f"{HUB_ID}/config.json"
    files = locate_model(recipe)
    assert files.transformer == files.root == tmp_path / "v2"
    assert sorted(file.name for file in files.root.iterdir()) == there[1:]


def test_what_the_cache_has_of_a_revision_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out as the Hub's client does it, without its links."""
    cache = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    for branch, place in (("main", "transformer"), ("v2", "")):
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / branch).write_text(f"commit-{branch}")
        (cache / "snapshots" / f"commit-{branch}" / place).mkdir(parents=True)
        config = {"_class_name": branch}
        (cache / "snapshots" / f"commit-{branch}" / place / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision, branch in ((None, "main"), ("v2", "v2")):
        found = locate_config(recipe_for(HUB_ID, tmp_path, monkeypatch, revision=revision))
        assert found.content == {"_class_name": branch}


def test_revisions_belong_to_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pipeline(tmp_path / "model")
    with pytest.raises(InputError, match=r"model\.revision: .*/model is a directory"):
        locate_config(recipe_for("model", tmp_path, monkeypatch, revision="main"))


@pytest.mark.usefixtures("empty_hub")
def test_a_revision_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RevisionNotFoundError

    response: Any = SimpleNamespace(status_code=404, headers={}, request=None)
    absent = answering(RevisionNotFoundError("none", response=response))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(InputError, match=f"repository {HUB_ID} has no revision 'v3'"):
        locate_model(recipe_for(HUB_ID, tmp_path, monkeypatch, revision="v3"))


@pytest.mark.usefixtures("empty_hub")
def test_a_dry_run_keeps_nothing_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Path] = []

    def snapshot_download(
        hub_id: str, *, revision: str | None, allow_patterns: list[str], cache_dir: str | None
    ) -> str:
        assert (hub_id, revision) == (HUB_ID, None)
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        used.append(Path(str(cache_dir)))
        write_pipeline(Path(str(cache_dir)) / "snapshot")
        return str(Path(str(cache_dir)) / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = locate_config(recipe_for(HUB_ID, tmp_path, monkeypatch))
    assert found.content == {"_class_name": "transformer"}
    assert found.weights_missing == f"{HUB_ID} will be downloaded from the Hub"
    assert not used[0].exists()
    assert list(tmp_path.iterdir()) == []
