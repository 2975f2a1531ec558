"""Efforts set what a method leaves open, and unknown ones are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.errors import InputError
from exporter.method_section import MethodSection
from exporter.recipe import Recipe, load_recipe, recipe_to_yaml
from exporter.recipe_file import shipped_recipes

SMALLEST = "model: {weights: weights}\npreset: w4a6\ncalibration: {prompts: p.safetensors}\n"
DEFAULT = MethodSection(effort="default", balance=True)
FROM_NEAREST = ("fp4dit", "nearest", 2500, 0.03, False)


def recipe_with(method: Any = None, **model: Any) -> Recipe:
    data = {"model": {"weights": "w", **model}, "preset": "w4a6", "calibration": {"prompts": "p"}}
    return Recipe.model_validate(data if method is None else {**data, "method": method})


def how(method: MethodSection) -> tuple[object, ...]:
    return method.name, method.start, method.iterations, method.learning_rate, method.balance


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


@pytest.mark.parametrize("method", [None, {}, {"effort": None}, MethodSection()])
def test_a_recipe_that_says_nothing_gets_the_best_at_no_cost(method: Any) -> None:
    assert recipe_with(method).method == DEFAULT


def test_what_does_not_say_how_to_round_is_kept() -> None:
    found = recipe_with({"batch_size": 8, "scale_search": "absmax"}).method
    assert found == DEFAULT.model_copy(update={"batch_size": 8, "scale_search": "absmax"})
    assert recipe_with(MethodSection(batch_size=8)).method == DEFAULT.model_copy(update={"batch_size": 8})
    for balance in (False, True, "exact"):
        assert recipe_with({"balance": balance}).method == DEFAULT.model_copy(update={"balance": balance})


def test_generic_models_are_not_balanced_unasked() -> None:
    generic = {"family": "generic", "inputs": {"encoder_hidden_states": (None, 4)}}
    for method in (None, {"batch_size": 8}):
        found = recipe_with(method, **generic).method
        assert (found.effort, found.start, found.balance) == ("default", "gptq", False)
    with pytest.raises(ValueError, match=r"method\.balance: of family generic it is not known"):
        recipe_with({"balance": True}, **generic)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "fp4dit"}, FROM_NEAREST),
        ({"name": "rtn"}, ("rtn", *FROM_NEAREST[1:])),
        ({"start": "nearest"}, FROM_NEAREST),
        ({"iterations": 7}, ("fp4dit", "nearest", 7, 0.03, False)),
        ({"learning_rate": 0.02}, ("fp4dit", "nearest", 2500, 0.02, False)),
    ],
    ids=str,
)
def test_a_method_that_says_a_part_gets_the_fields_defaults(
    method: dict[str, Any], expected: tuple[object, ...]
) -> None:
    recipe = recipe_with(method)
    assert how(recipe.method) == expected
    assert recipe.method == MethodSection.model_validate(method) == recipe_with(MethodSection(**method)).method


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"effort": "default"}, ("fp4dit", "gptq", 250, 0.01, True)),
        ({"effort": "fast"}, ("gptq", *FROM_NEAREST[1:-1], True)),
        ({"effort": "best", "iterations": 7}, ("fp4dit", "gptq", 7, 0.01, True)),
        ({"effort": "fast", "balance": False}, ("gptq", *FROM_NEAREST[1:])),
    ],
    ids=str,
)
def test_an_effort_balances_unless_told_otherwise(method: dict[str, Any], expected: tuple[object, ...]) -> None:
    recipe = recipe_with(method)
    assert how(recipe.method) == expected
    assert recipe.method == recipe_with(MethodSection(**method)).method


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["method.balance=false"],
        ["method.name=fp4dit"],
        ["method.effort=fast"],
        ["model.family=generic", "model.inputs={a: [null]}"],
    ],
    ids=str,
)
def test_a_resolved_recipe_means_itself(changes: list[str], tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALLEST, encoding="utf-8")
    recipe = load_recipe(tmp_path / "small.yaml", changes)
    resolved = recipe_to_yaml(recipe)
    for value in ("name", "start", "iterations", "learning_rate", "balance"):
        assert f"  {value}: " in resolved
    (tmp_path / "resolved.yaml").write_text(resolved, encoding="utf-8")
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again.method == recipe.method
    assert recipe_to_yaml(again).splitlines()[1:] == resolved.splitlines()[1:]


def test_shipped_recipes_say_how_they_round() -> None:
    """All of it: a change of what is open changes none of them."""
    for name in shipped_recipes():
        method = load_recipe(name).method
        if name.endswith("_fp4dit"):
            assert (method.effort, method.scale_search) == (None, "absmax"), name
            assert (method.name, method.start, method.iterations) == ("fp4dit", "nearest", 2500), name
            assert (method.balance, method.step_weights, method.quantize_activations) == (False, "uniform", False), name
        else:
            assert method == DEFAULT.model_copy(update={"batch_size": method.batch_size}), name
        assert {"balance", "batch_size", "scale_search"} <= method.model_fields_set, name


def test_the_alpha_recipes_differ_in_their_size_alone() -> None:
    whole = {"model": {"weights"}, "calibration": {"samples"}}
    dumps = [
        load_recipe(name).model_dump(exclude=whole)
        for name in ("pixart_alpha_w4a6", "pixart_alpha_256_w4a6", "pixart_alpha_1024_w4a6")
    ]
    assert dumps[0] == dumps[1] == dumps[2]
