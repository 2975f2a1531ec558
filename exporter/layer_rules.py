"""Which of a recipe's rules a layer goes by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from exporter.errors import InputError, did_you_mean
from exporter.layer_section import LayerRule
from exporter.recipe import Recipe

LINEAR = ".linear"
"""Ends the module path of a quantized layer inside of a transformed one."""


def winning_rule(name: str, rules: Sequence[LayerRule]) -> int | None:
    """The number of the first rule that matches the layer's module path; None if none does."""
    return next((index for index, rule in enumerate(rules) if _matches(rule, name)), None)


def check_rules(recipe: Recipe, names: Sequence[str], won: Sequence[int | None], others: Iterable[str]) -> None:
    """Raise `InputError` for a rule that has `won` none of the linear layers `names`; `others` are other modules."""
    for index, rule in enumerate(recipe.layers):
        if index in won:
            continue
        where = f"{recipe.name}: layers[{index}].match: {rule.match!r}"
        if any(_matches(rule, name) for name in names):
            raise InputError(f"{where} matches only layers that earlier rules take; move it before them")
        matched = [name for name in others if fnmatchcase(name, rule.match)]
        if matched:
            raise InputError(f"{where} matches no linear layer, and only linear layers are quantized: {matched[0]}")
        raise InputError(f"{where} matches no layer" + did_you_mean(rule.match, layer_patterns(names)))


def _matches(rule: LayerRule, name: str) -> bool:
    """Whether the rule is for the layer; transformed, it has the name of its quantized part in reports."""
    return fnmatchcase(name, rule.match) or rule.match == f"{name}{LINEAR}"


def layer_patterns(names: Sequence[str]) -> list[str]:
    """Patterns that could be meant: full names, and names with the block's number or all before it as a star."""
    patterns: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
        if number is not None:
            patterns[".".join([*parts[:number], "*", *parts[number + 1 :]])] = None
            patterns[".".join(["*", *parts[number + 1 :]])] = None
            patterns[".".join(["*", *parts[number + 1 : -1], "*"])] = None
    return [*patterns, *names]
