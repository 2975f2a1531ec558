"""Efforts set what a method leaves open, and unknown ones are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.errors import InputError
from exporter.method_section import MethodSection
from exporter.recipe import load_recipe

SMALLEST = "model: {weights: weights}\npreset: w4a6\ncalibration: {prompts: p.safetensors}\n"


def test_an_effort_fills_in_what_is_not_given() -> None:
    assert MethodSection.model_validate({"effort": "fast"}).name == "gptq"
    method = MethodSection.model_validate({"effort": "default", "iterations": 7})
    assert (method.name, method.start, method.iterations) == ("fp4dit", "gptq", 7)
    assert MethodSection.model_validate({"effort": "fast", "name": "rtn"}).name == "rtn"
    assert MethodSection() == MethodSection.model_validate({"name": "fp4dit", "start": "nearest"})


@pytest.mark.parametrize("value", ["slow", "[]", "3"])
def test_an_unknown_effort_is_named(value: str, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALLEST, encoding="utf-8")
    with pytest.raises(InputError, match=r"method\.effort: "):
        load_recipe(recipe, [f"method.effort={value}"])
