"""How two calibrations differ, in words: their settings, and what becomes of which layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from exporter.layer_rules import LINEAR

PROGRAM = "program"
"""The setting that names the program and its libraries' versions."""

_LAYERS, _FILES = "layers", "files."
_MOST_NAMED = 3
# A fact of a layer whose format is open, which may yet become any of them.
_CANDIDATES = "candidates"
# Facts of a layer that only one whose model is changed around it has; its name ends with LINEAR then.
_TRANSFORMS = {"low_rank", "hadamard", "shift"}
# A recipe's words for what is named otherwise.
_WORDS = {
    "latent_shape": "model.resolution: latents",
    "weight_format": "weight",
    "activation_format": "activation",
    "group_size": "group",
    "output_format": "output",
    "m": "multipliers",
}


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What `earlier` settings had that those of `now` have not, "A 1, not 2; …": the first few, and how many more.

    Both are JSON values by name, "layers" a list of facts with their "name". "" where nothing differs. What is no
    such list or mapping raises `AttributeError`, `KeyError` or `TypeError`.
    """
    found = [*_other_settings(_plain(earlier), _plain(now)), *_other_layers(_layers(earlier), _layers(now))]
    more = len(found) - _MOST_NAMED
    return "; ".join(found[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _plain(settings: Mapping[str, Any]) -> dict[str, object]:
    """Dotted name → value of all but the layers."""
    return dict(_flat({name: value for name, value in settings.items() if name != _LAYERS}))


def _flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name → value of everything that is not a mapping."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else key)


def _other_settings(old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[str]:
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) == new.get(name):
            continue
        if name == PROGRAM:
            yield "another version of fp4export or of its libraries"
        elif name.startswith(_FILES):
            yield f"another content of {name.removeprefix(_FILES)}"
        else:
            word = _WORDS.get(name, name)
            yield f"{word} {_text(old.get(name))}, not {_text(new.get(name))}"


def _layers(settings: Mapping[str, Any]) -> dict[str, dict[str, object]]:
    """Module path in the model as it was loaded → facts."""
    layers = {}
    for facts in settings.get(_LAYERS, ()):
        path = facts["name"].removesuffix(LINEAR) if _TRANSFORMS & facts.keys() else facts["name"]
        layers[path] = {name: value for name, value in facts.items() if name != "name"}
    return layers


def _other_layers(old: Mapping[str, dict[str, object]], new: Mapping[str, dict[str, object]]) -> Iterator[str]:
    for path in dict.fromkeys([*new, *old]):
        if path not in old:
            yield f"{path} in high precision, not quantized"
        elif path not in new:
            yield f"{path} quantized, not in high precision"
        elif _CANDIDATES not in new[path]:
            for name, value in _other_facts(old[path], new[path]):
                yield f"{path}: {name} {value}"


def _other_facts(old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) != new.get(name):
            yield _WORDS.get(name, name), f"{_text(old.get(name))}, not {_text(new.get(name))}"


def _text(value: object) -> str:
    return "none" if value is None else json.dumps(value).strip('"')
