"""One line out of a pydantic error: where, what, and the nearest valid value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from exporter.errors import did_you_mean

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

Location = tuple[str | int, ...]

_LONGEST_VALUE = 60
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "model": "a mapping of keys to values",
    "dict": "a mapping of keys to values",
}
_LIMITS = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "greater than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
}


@dataclass(frozen=True)
class Problem:
    """The first thing wrong with some data: its location there, and a message without a location."""

    location: Location
    message: str

    @property
    def path(self) -> str:
        """The location as a reader writes it: ``layers[0].weight``."""
        return format_location(self.location)


def format_location(location: Sequence[str | int]) -> str:
    """``("layers", 0, "weight")`` → ``layers[0].weight``."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def explain(error: ValidationError, model: type[BaseModel]) -> Problem:
    """Describe the most telling error that pydantic found when it validated data against `model`."""
    # A mistyped key is also a missing one: name the key that is there.
    errors = sorted(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    first, *others = errors
    message = _message(first, model)
    if others:
        message += f" (and {len(others)} more)"
    return Problem(tuple(first["loc"]), message)


def _message(error: ErrorDetails, model: type[BaseModel]) -> str:
    kind, location = error["type"], tuple(error["loc"])
    context: dict[str, Any] = error.get("ctx", {})
    if kind == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        return "unknown key" + did_you_mean(str(location[-1]), owner.model_fields if owner else ())
    if kind == "missing":
        field = _field_at(model, location)
        return "missing" + (f"; it is {field.description}" if field and field.description else "")
    if kind == "literal_error":
        field = _field_at(model, location)
        choices = [_plain(choice) for choice in _literals(field.annotation)] if field else []
        return f"unknown {location[-1]} {_shown(error['input'])}" + did_you_mean(str(error["input"]), choices)
    if kind == "value_error":
        return str(context["error"])
    if kind in _LIMITS:
        return f"must be {_LIMITS[kind].format(**context)}, got {_shown(error['input'])}"
    if kind == "string_too_short":
        return "must not be empty"
    expected = _EXPECTED.get(kind.split("_")[0])
    if expected:
        return f"expected {expected}, got {_shown(error['input'])}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {_shown(error['input'])}"


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = _plain(value) if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def _plain(value: object) -> str:
    """As YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _model_at(model: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The model that describes the mapping at `location`."""
    if not location:
        return model
    field = _field_at(model, location)
    return next(iter(_models(field.annotation)), None) if field else None


def _field_at(model: type[BaseModel], location: Location) -> FieldInfo | None:
    """The field at `location`; a list index is skipped, since all entries share one description."""
    current: type[BaseModel] | None = model
    field: FieldInfo | None = None
    for part in location:
        if isinstance(part, int):
            continue
        if current is None:
            return None
        field = current.model_fields.get(part)
        current = next(iter(_models(field.annotation)), None) if field else None
    return field


def _models(annotation: object) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation such as ``tuple[LayerRule, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _literals(annotation: object) -> list[object]:
    """The choices inside an annotation such as ``Literal["a", "b"] | None``."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for argument in get_args(annotation) for choice in _literals(argument)]
