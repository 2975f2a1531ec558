"""One line out of a pydantic error."""

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from exporter.explain import Problem, explain, format_location


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    size: int
    kind: Literal["plain", "fancy"] = "plain"


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    parts: list[Inner] = []
    one: Inner | None = None


def problem_of(data: object) -> Problem:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    return explain(caught.value, Outer)


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        ({"parts": [{"size": 1}, {"size": 2, "knd": "x"}]}, "parts[1].knd", "unknown key; did you mean 'kind'?"),
        ({"parts": [{"size": "2"}]}, "parts[0].size", "expected a whole number, got '2'"),
        ({"one": {"size": 1, "kind": "fancey"}}, "one.kind", "unknown kind 'fancey'; did you mean 'fancy'?"),
        ({"one": {"sizee": 1}}, "one.sizee", "unknown key; did you mean 'size'? (and 1 more)"),
        ({"one": 3}, "one", "expected a mapping of keys to values, got 3"),
        ({"one": {"size": "x" * 500}}, "one.size", f"expected a whole number, got '{'x' * 59}…"),
        ([], "", "expected a mapping of keys to values, got a list"),
    ],
)
def test_place_and_message(data: object, path: str, message: str) -> None:
    problem = problem_of(data)
    assert (problem.path, problem.message) == (path, message)


def test_locations_read_as_they_are_written() -> None:
    assert format_location(("layers", 0, "weight")) == "layers[0].weight"
    assert format_location(()) == ""
