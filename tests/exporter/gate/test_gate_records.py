"""A saved reference comes back as it was; anything else in its place is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from exporter.errors import InputError
from exporter.gate.records import MANIFEST, LinearRecord, OutputRecord, Reference
from tests.exporter.gate.hand_made import Example


def assert_same(record: LinearRecord | OutputRecord, other: LinearRecord | OutputRecord) -> None:
    for field in fields(record):
        assert np.array_equal(getattr(record, field.name), getattr(other, field.name)), field.name


def test_round_trip(example: Example, tmp_path: Path) -> None:
    weight_only = replace(
        example.reference.linears[1],
        layer="w",
        activation_format="none",
        values=None,
        scales=None,
        rank=2,
        products="fp16",
    )
    first = example.reference.linears[0]
    output = OutputRecord("blocks.0.fc", "e2m3", 3, first.x, first.values, first.scales)
    reference = replace(example.reference, linears=(*example.reference.linears, weight_only), outputs=(output,))
    reference.save(tmp_path)
    back = Reference.load(tmp_path)
    for record, other in zip(reference.linears, back.linears, strict=True):
        assert_same(record, other)
    (kept,) = back.outputs
    assert_same(output, kept)
    assert np.array_equal(kept.rounded, first.values * first.scales)
    for model, other in zip(reference.models, back.models, strict=True):
        assert model.timestep == other.timestep
        assert model.inputs.keys() == other.inputs.keys()
        assert all(np.array_equal(model.boundaries[name], other.boundaries[name]) for name in model.boundaries)
    facts = ("blocks", "end_to_end_threshold", "quantization_db", "sensitivity_db")
    assert all(getattr(reference, name) == getattr(back, name) for name in facts)
    assert list(back.thresholds.items()) == list(reference.thresholds.items())


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--no-validate"):
        Reference.load(tmp_path)


@pytest.mark.parametrize("damage", ["truncated tensors", "no JSON", "another version", "a field less", "a tensor less"])
def test_damage_is_refused(example: Example, tmp_path: Path, damage: str) -> None:
    example.reference.save(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    tensors = tmp_path / "reference.safetensors"
    if damage == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:500])
    elif damage == "another version":
        manifest["version"] = 99
    elif damage == "a field less":
        del manifest["blocks"]
    elif damage == "a tensor less":
        manifest["linears"][0]["layer"] = "nowhere"
    (tmp_path / MANIFEST).write_text("{" if damage == "no JSON" else json.dumps(manifest))
    with pytest.raises(InputError, match="reference"):
        Reference.load(tmp_path)
