"""The licence of the weights is what the model's own folder says, or plainly unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.bundle.licence import Licence, find_licence
from exporter.models.location import find_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    return tmp_path


def found(model: Path) -> tuple[str, str | None]:
    """The same for the pipeline's folder and for the transformer's."""
    licences = {find_licence(find_model(folder)) for folder in (model, model / "transformer")}
    (licence,) = licences
    return licence.name, licence.stated_in


def test_nothing_is_unknown(model: Path) -> None:
    assert find_licence(find_model(model)) == Licence("unknown", None, None)


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("---\nlicense: openrail++\ntags: [a]\n---\n# Model\n", "openrail++"),
        ("---\nlicense: other\nlicense_name: tencent-hunyuan\n---\n", "tencent-hunyuan"),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("# Model\nlicense: mit\n", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: !!python/object:os.system mit\n---\n", None),
        ("---\nlicense: mit\n", None),
    ],
)
def test_the_model_card_states_it_in_its_front_matter(model: Path, card: str, name: str | None) -> None:
    (model / "README.md").write_text(card)
    assert found(model) == (("unknown", None) if name is None else (name, "README.md"))


def test_model_index_is_asked_next_and_the_text_is_kept(model: Path) -> None:
    (model / "LICENSE").write_text("Permission is hereby granted")
    assert found(model) == ("see LICENSE", "LICENSE")
    (model / "model_index.json").write_text('{"license": "apache-2.0"}')
    assert found(model) == ("apache-2.0", "model_index.json")
    assert find_licence(find_model(model)).text == model / "LICENSE"
    (model / "model_index.json").write_text("not json")
    (model / "README.md").write_bytes(b"---\n\xff\xfe\n---\n")
    assert found(model) == ("see LICENSE", "LICENSE")
