"""The model families there are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from exporter.errors import InputError
from exporter.model_section import ModelSection
from exporter.models.adapter import Adapter
from exporter.models.dit import DiTAdapter
from exporter.models.generic import GenericAdapter
from exporter.models.hunyuan import HunyuanAdapter
from exporter.models.pixart import PixArtAdapter

ADAPTERS: Mapping[str, Adapter] = MappingProxyType(
    {adapter.family: adapter for adapter in (PixArtAdapter(), HunyuanAdapter(), DiTAdapter())}
)


def recipe_adapter(section: ModelSection) -> Adapter:
    """The adapter of the family that a recipe names; the generic one with what the recipe says of the model."""
    if section.family == GenericAdapter.family:
        return GenericAdapter(section.inputs or {}, section.blocks)
    return ADAPTERS[section.family]


def adapter_of(config: Mapping[str, Any], file: Path) -> Adapter:
    """The adapter for the transformer that a config describes. Raises `InputError` naming `file`."""
    name = config.get("_class_name")
    found = next((adapter for adapter in ADAPTERS.values() if adapter.class_name == name), None)
    if found is None:
        known = ", ".join(adapter.class_name for adapter in ADAPTERS.values())
        raise InputError(
            f"{file}: _class_name is {name!r}; the families here are {known}; docs/architecture.md shows how to add one"
        )
    return found
