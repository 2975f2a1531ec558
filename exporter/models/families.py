"""The model families there are."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from exporter.errors import InputError, did_you_mean
from exporter.models.adapter import Adapter
from exporter.models.dit import DiTAdapter
from exporter.models.hunyuan import HunyuanAdapter
from exporter.models.pixart import PixArtAdapter

ADAPTERS: Mapping[str, Adapter] = MappingProxyType(
    {adapter.family: adapter for adapter in (PixArtAdapter(), HunyuanAdapter(), DiTAdapter())}
)


def get_adapter(family: str) -> Adapter:
    """The adapter of a model family. Raises `InputError`."""
    if family not in ADAPTERS:
        raise InputError(f"unknown family {family!r}{did_you_mean(family, ADAPTERS)}")
    return ADAPTERS[family]
