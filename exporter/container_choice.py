"""Which number container a layer is multiplied in on a target, or why the target cannot run it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from exporter.errors import InputError
from exporter.presets import LayerScheme
from exporter.recipe import HIGH_PRECISION
from exporter.targets import TARGETS, Target
from plugins.block_scales import BLOCK_SCALINGS
from plugins.containers import CONTAINERS, exact_product, fits, multipliers
from plugins.domain import AUTO_CONTAINER
from plugins.formats import get_format

# The hardware's own types, values and scales together.
_BLOCK_CONTAINERS: Mapping[str, str] = MappingProxyType({"nvfp4": "fp4", "mx": "mxfp8"})

# E1M2's values are the integers -7 … 7: symmetric INT4 under another name.
_INT4_FORMATS = ("e1m2", "int4")


def choose_container(layer: str, scheme: LayerScheme, in_features: int, target: Target) -> str:
    """The container's name: ``int8``, ``fp8``, ``int4``, ``fp4``, ``mxfp8`` or ``fp32``.

    Raises `InputError` naming the layer, why the target refuses, and what would work.
    """
    container = _container(scheme, in_features, target)
    if container is None:
        others = [
            name
            for name, other in TARGETS.items()
            if name != target.name and _container(scheme, in_features, other) is not None
        ]
        raise InputError(
            f"{layer}: target {target.name} cannot run {_described(scheme)}: {_refusal(scheme, in_features, target)}; "
            f"targets that can: {', '.join(others) or 'none'}"
        )
    return container


def scale_multipliers(scheme: LayerScheme, container: str) -> tuple[int, ...]:
    """The integers that foldable group scales may multiply the channel's scale with; (1,) for other scales.

    They are the container's own where it is FP8, so that folded weights stay exact there, else those of INT8.
    """
    if scheme.scales != "foldable":
        return (1,)
    chosen = CONTAINERS["fp8" if container == "fp8" else "int8"]
    return multipliers(get_format(scheme.weight_format), chosen) or (1,)


def _container(scheme: LayerScheme, in_features: int, target: Target) -> str | None:
    """The container that the scheme asks for, or the target's best, if the layer is exact in it there."""
    possible = _containers(scheme, in_features, target)
    if scheme.container == AUTO_CONTAINER:
        return possible[0] if possible else None
    return scheme.container if scheme.container in possible else None


def _containers(scheme: LayerScheme, in_features: int, target: Target) -> tuple[str, ...]:
    """All that the layer is exact in on the target, best first."""
    if scheme.scales in BLOCK_SCALINGS:
        native = _BLOCK_CONTAINERS[scheme.scales]
        held = ("fp32",) if target.engine == "onnxruntime" else target.containers
        return tuple(name for name in (native, "fp32") if name in held)
    if target.engine == "onnxruntime":
        return ("int8", "fp32") if _exact_in_int8(scheme, in_features) else ("fp32",)
    if scheme.activation_format == HIGH_PRECISION:
        return _weight_only(scheme, target)
    if scheme.scales == "group":
        return ()
    int8 = ("int8",) if _exact_in_int8(scheme, in_features) else ()
    names = (scheme.weight_format, scheme.activation_format)
    fp8 = "fp8" in target.containers and all(fits(get_format(name), CONTAINERS["fp8"]) for name in names)
    return (*int8, "fp8") if fp8 else int8


def _weight_only(scheme: LayerScheme, target: Target) -> tuple[str, ...]:
    if scheme.scales == "group":
        int4 = "int4" in target.containers and scheme.weight_format in _INT4_FORMATS
        return ("int4",) if int4 else ()
    return ("int8",) if fits(get_format(scheme.weight_format), CONTAINERS["int8"]) else ()


def _exact_in_int8(scheme: LayerScheme, in_features: int) -> bool:
    """Whether products and sums of K = `in_features` are exact, group scales folded into the weights."""
    if scheme.scales in ("group", *BLOCK_SCALINGS) or scheme.activation_format == HIGH_PRECISION:
        return False
    largest = max(scale_multipliers(scheme, "int8"))
    formats = get_format(scheme.weight_format), get_format(scheme.activation_format)
    return exact_product(*formats, CONTAINERS["int8"], in_features, largest).exact


def _described(scheme: LayerScheme) -> str:
    activations = scheme.activation_format
    what = "alone" if activations == HIGH_PRECISION else f"with {activations} activations"
    asked = "" if scheme.container == AUTO_CONTAINER else f" in {scheme.container}"
    return f"{scheme.weight_format} weights {what} and {scheme.scales} scales{asked}"


def _refusal(scheme: LayerScheme, in_features: int, target: Target) -> str:
    """Why `_container` found nothing, and the nearest change that helps."""
    possible = _containers(scheme, in_features, target)
    if possible:
        return f"it is exact there in {' or '.join(possible)}; use `container: auto`"
    if scheme.scales in BLOCK_SCALINGS:
        return "its hardware multiplies no blocks with scales of their own; `preset: w4a6` or w4a8 runs there"
    if scheme.scales == "group" and scheme.activation_format == HIGH_PRECISION:
        return "group scales need e1m2 or int4 weights and an INT4 engine; use `scales: foldable`"
    if scheme.scales == "group":
        return "free group scales do not factor out of the product; use `scales: foldable` (or channel)"
    names = [scheme.weight_format]
    if scheme.activation_format != HIGH_PRECISION:
        names.append(scheme.activation_format)
    held = [name for name in ("int8", "fp8") if name in target.containers]
    for name in names:
        if not any(fits(get_format(name), CONTAINERS[container]) for container in held):
            return f"{name} values do not fit {' or '.join(held)}; e2m1 weights with e2m3 activations do"
    return f"the two do not fit the same one of {', '.join(held)}; e2m1 weights with e2m3 activations do"
