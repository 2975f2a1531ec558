"""The manifest has one form; whatever else a file of that name may say is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.bundle.manifest import MANIFEST, Manifest
from exporter.errors import InputError


def document_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return document


def test_it_reads_back_what_it_wrote(bundle_folder: Path) -> None:
    text = (bundle_folder / MANIFEST).read_text()
    manifest = Manifest.from_json(text, "m")
    assert manifest.to_json() == text
    assert manifest.targets[0].compute_capability == (9, 0)
    assert manifest.checksum == document_of(bundle_folder)["sha256"]


def set_path(path: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["files"][0]["path"] = path

    return change


def twin(path: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["files"].append({**document["files"][0], "path": path})

    return change


def put(*keys: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_path("/etc/passwd"), "leads out of the bundle"),
        (set_path("../outside"), "leads out of the bundle"),
        (set_path("a/../../outside"), "leads out of the bundle"),
        (set_path("a//b"), "not a plain relative path"),
        (set_path("./a"), "not a plain relative path"),
        (set_path("a/"), "not a plain relative path"),
        (set_path("a\\b"), "not a plain relative path"),
        (set_path("c:a"), "not a plain relative path"),
        (set_path("a\0b"), "expected text"),
        (put("weights", "licence", value="mit\x1b[2J"), "expected text"),
        (set_path("a."), "not a plain relative path"),
        (set_path(""), "expected text"),
        (set_path(3), "expected text"),
        (set_path("a" * 300), "1 to 240 characters"),
        (set_path("/".join("a" * 9)), "at most 8 parts"),
        (twin("readme.md"), "same file on some file systems"),
        (twin("MANIFEST.JSON"), "same file on some file systems"),
        (twin("weights.data/x"), "is a file, and the folder of"),
        (put("targets", 0, "lowered", value="../lowered.onnx"), "leads out of the bundle"),
        (put("targets", 0, "lowered", value="absent.onnx"), "absent.onnx is not among its files"),
        (put("targets", 0, "kernels", value="lowered.cpu.kernels"), "no file of lowered.cpu.kernels is listed"),
        (put("targets", 0, "acceptance", "snr_db", value="40"), "expected a number"),
        (put("targets", 0, "acceptance", "snr_db", value=True), "expected a number"),
        (put("targets", 0, "compute_capability", value=[9]), "two integers or null"),
        (put("targets", 1, "name", value="h100"), "a target is there twice"),
        (put("targets", value=[]), "a list of 1 to"),
        (put("targets", value=[1]), "a list of objects"),
        (put("weights", value=None), "expected an object"),
        (put("weights", "more", value=1), "'more' is unknown"),
        (put("files", 0, "bytes", value=-1), "not negative"),
        (put("files", 0, "bytes", value=True), "not negative"),
        (put("files", 0, "sha256", value="A" * 64), "a SHA-256"),
        (put("files", 0, "sha256", value="0" * 64), "has changed"),
        (put("weights", "licence", value="mit"), "has changed"),
        (put("version", value=2), "reads version 1"),
        (put("format", value="other"), "not the manifest of a bundle"),
        (lambda document: document.pop("recipe"), "'recipe' is missing"),
    ],
)
def test_every_other_form_is_refused(bundle_folder: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    document = document_of(bundle_folder)
    change(document)
    with pytest.raises(InputError, match=words) as caught:
        Manifest.from_json(json.dumps(document), "m.json")
    assert str(caught.value).startswith("m.json")
    assert "\n" not in str(caught.value)


def test_letters_that_look_composed_alike_collide(bundle_folder: Path) -> None:
    document = document_of(bundle_folder)
    twin("caf\u00e9")(document)
    twin("cafe\u0301")(document)
    with pytest.raises(InputError, match="same file"):
        Manifest.from_json(json.dumps(document), "m")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not the manifest"),
        ("[]", "not the manifest"),
        ("[" * 100_000, "not the manifest"),
        ('{"format": "a", "format": "fp4export.bundle"}', "'format' is there twice"),
        ('{"format": NaN}', "NaN is no number"),
        ('{"\\u001b[2J": 1}', "is no text"),
        ('{"version": ' + "9" * 5000 + "}", "not the manifest"),
    ],
)
def test_hostile_json_is_one_line(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Manifest.from_json(text, "m")


def test_a_key_given_twice_is_refused_even_if_both_agree(bundle_folder: Path) -> None:
    text = (bundle_folder / MANIFEST).read_text()
    line = ' "name": "tiny",\n'
    assert line in text
    with pytest.raises(InputError, match="'name' is there twice"):
        Manifest.from_json(text.replace(line, 2 * line), "m")
