"""YAML in, plain values out, nothing that runs."""

import pytest

from exporter.errors import InputError
from exporter.yaml_text import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1.5e+2", 150.0), ("20", 20), ("e2m1", "e2m1"), ("none", "none"), ("null", None), ("", None)],
)
def test_scalars(text: str, value: object) -> None:
    assert parse_yaml(text, "here") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", r"r\.yaml:3: not valid YAML"),
        ("a: 1\na: 2\n", r"r\.yaml:2: not valid YAML: the key 'a' is there twice"),
        ("a: !!python/object/apply:os.system [true]\n", r"r\.yaml:1: not valid YAML: could not determine"),
        ("a: \x01\n", r"r\.yaml: not a text file"),
        ("[" * 100_000, r"r\.yaml: nested too deeply"),
        ("a: 2024-99-99\n", r"r\.yaml: not valid YAML"),
        ("{[1]: 2}", r"r\.yaml:1: not valid YAML"),
        ("--- 1\n--- 2\n", r"r\.yaml:2: not valid YAML"),
    ],
)
def test_errors_name_the_place(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_yaml(text, "r.yaml")


def test_what_is_dumped_parses_to_the_same() -> None:
    value = {"b": [1, 2.5, {"x": None}], "a": "e2m1", "rate": 1e-05}
    assert parse_yaml(dump_yaml(value), "dump") == value
    assert list(parse_yaml(dump_yaml(value), "dump")) == ["b", "a", "rate"]
