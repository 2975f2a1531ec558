"""Which number container a layer is multiplied in on a target, or why the target cannot run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from exporter.errors import InputError
from exporter.layer_section import HIGH_PRECISION
from exporter.presets import LayerScheme
from exporter.targets import TARGETS, Target
from plugins.block_scales import BLOCK_SCALINGS
from plugins.container_product import ContainerProduct, foldable_multipliers
from plugins.containers import CONTAINERS, FP8, FP16, INT4, INT8, Container, activation_factor, fits
from plugins.domain import AUTO_CONTAINER
from plugins.formats import get_format
from plugins.packed_linear.descriptor import PACKED_FORMATS, GroupFactors, PackedLinear, VariantError
from plugins.token_quantize.variant import MAX_K

# The hardware's own types, values and scales together.
_ALL_PLUGINS = ("int8", "fp8", "fp16")
_BLOCK_CONTAINERS: Mapping[str, str] = MappingProxyType({"nvfp4": "fp4", "mx": "mxfp8"})


def choose_container(layer: str, scheme: LayerScheme, in_features: int, target: Target) -> str:
    """The container's name: ``int8``, ``fp8``, ``fp16``, ``int4``, ``fp4``, ``mxfp8`` or ``fp32``.

    INT8 where the layer is exact there, else FP8 where the target has it and it holds every operand, else, on a CPU,
    FP32; what the scheme asks for instead, if it is one of those. Sums in FP8, FP16 and FP32 are rounded as FP32's are,
    unless `ContainerProduct.exact` says otherwise. Block scaling runs in the type that has it, on a CPU in FP32.
    TensorRT accumulates in FP32 only what it then rounds to FP16, so FP16 is for plugins: where there is no FP8, and
    for weights alone. Raises `InputError` naming the layer, why the target refuses, and what would work.
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
            f"targets that can: {', '.join(others) or 'none'}{_plugin_advice(scheme, in_features, target)}"
        )
    return container


def has_kernel(scheme: LayerScheme, in_features: int) -> bool:
    """Whether there is a plugin of ours that multiplies such a layer, in some container."""
    return scheme.scales not in BLOCK_SCALINGS and bool(_plugin_containers(scheme, in_features, _ALL_PLUGINS))


def kernel_container(scheme: LayerScheme, in_features: int, *, has_fp8: bool) -> str | None:
    """The container in which a kernel of ours multiplies the layer on a GPU, with or without FP8; None if in none.

    The one that the scheme asks for, if it is possible, else the best. "fp16" is also the one of weights alone.
    """
    if scheme.scales in BLOCK_SCALINGS:
        return None
    containers = _ALL_PLUGINS if has_fp8 else tuple(name for name in _ALL_PLUGINS if name != FP8.name)
    possible = _plugin_containers(scheme, in_features, containers)
    return scheme.container if scheme.container in possible else next(iter(possible), None)


def container_product(
    scheme: LayerScheme, in_features: int, container: Container, multipliers: tuple[int, ...] | None = None
) -> ContainerProduct:
    """What the product of a layer without block scaling is in the container; `multipliers` that it has, if not all
    that it may have."""
    weights = get_format(scheme.weight_format)
    quantized = scheme.activation_format != HIGH_PRECISION
    return ContainerProduct(
        weight_format=weights,
        activation_format=get_format(scheme.activation_format) if quantized else None,
        container=container,
        k=in_features,
        multipliers=multipliers or scale_multipliers(scheme, container.name),
        free_groups=scheme.scales == "group",
    )


def scale_multipliers(scheme: LayerScheme, container: str) -> tuple[int, ...]:
    """The integers that foldable group scales may multiply the channel's scale with; (1,) for other scales."""
    if scheme.scales != "foldable":
        return (1,)
    return foldable_multipliers(get_format(scheme.weight_format), CONTAINERS[container])


def exact_text(product: ContainerProduct | None) -> str:
    """``yes`` or ``no``; a dash for block scaling."""
    return "–" if product is None else "yes" if product.exact else "no"


def accumulator_text(product: ContainerProduct | None) -> str:
    """How much of the accumulator the longest sum may use, in bits: ``22.8 of 31``; a dash where none is stated."""
    bits = None if product is None else product.accumulator_bits
    return f"{bits[0]:.1f} of {bits[1]:.0f}" if bits else "–"


def needs_vnni(product: ContainerProduct | None) -> bool:
    """True for INT8 products whose pairs exceed 16 bits, in which x86 CPUs without VNNI add them, saturating.

    Activations are bytes with the largest numerator as zero point, so that they reach twice that; weights may be
    anything that INT8 holds.
    """
    if product is None or product.container != INT8 or product.activation_format is None:
        return False
    weight = product.weight_format.max_numerator * max(product.multipliers)
    return 2 * 2 * product.activation_format.max_numerator * weight > np.iinfo(np.int16).max


def _container(scheme: LayerScheme, in_features: int, target: Target) -> str | None:
    """The container that the scheme asks for, or the target's best, if the layer can be multiplied in it there."""
    possible = _containers(scheme, in_features, target)
    if scheme.container == AUTO_CONTAINER:
        return possible[0] if possible else None
    return scheme.container if scheme.container in possible else None


def _containers(scheme: LayerScheme, in_features: int, target: Target) -> tuple[str, ...]:
    """All that the layer can be multiplied in on the target, best first."""
    if scheme.scales in BLOCK_SCALINGS:
        native = _BLOCK_CONTAINERS[scheme.scales]
        held = ("fp32",) if target.engine == "onnxruntime" else target.containers
        return tuple(name for name in (native, "fp32") if name in held)
    in_int8 = ("int8",) if container_product(scheme, in_features, INT8).exact else ()
    if target.engine == "onnxruntime":
        return (*in_int8, "fp32")
    if target.kernels == "plugin" and has_kernel(scheme, in_features):
        return _plugin_containers(scheme, in_features, target.containers)
    if scheme.activation_format == HIGH_PRECISION:
        return _weight_only(scheme, target)
    if scheme.scales == "group":
        return ()
    in_fp8 = "fp8" in target.containers and container_product(scheme, in_features, FP8).holds_operands
    return (*in_int8, "fp8") if in_fp8 else in_int8


def _plugin_containers(scheme: LayerScheme, in_features: int, containers: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `containers` that a plugin can multiply the layer in, best first.

    Group scales, free ones or multipliers, belong to a group's partial sum there, not to its weights.
    """
    if scheme.weight_format not in PACKED_FORMATS or in_features > MAX_K:
        return ()
    if scheme.activation_format == HIGH_PRECISION:
        return tuple(name for name in containers if name == "fp16")
    whole = replace(scheme, scales="channel") if scheme.scales == "group" else scheme
    activations = get_format(scheme.activation_format)
    possible = {
        "int8": container_product(whole, in_features, INT8).exact,
        "fp8": container_product(whole, in_features, FP8).holds_operands,
        # FP16 operands are decoded from E4M3's bytes.
        "fp16": activation_factor(activations, FP8) is not None,
    }
    return tuple(name for name in containers if possible.get(name) and _is_described(scheme, in_features, name))


def _is_described(scheme: LayerScheme, in_features: int, container: str) -> bool:
    """Whether there is such an operator: an INT8 kernel may multiply more than numerators, so its sums are shorter."""
    factors: Mapping[str, GroupFactors] = {"foldable": "multipliers", "group": "scales"}
    try:
        PackedLinear(
            scheme.weight_format,
            container,
            "fp32",
            n=1,
            k=in_features,
            group_size=scheme.group_size,
            group_factors=factors.get(scheme.scales, ""),
        )
    except VariantError:
        return False
    return True


def _plugin_advice(scheme: LayerScheme, in_features: int, target: Target) -> str:
    """What `kernels: plugin` would change, if anything."""
    if target.kernels == "plugin" or not target.plugin_containers:
        return ""
    able = _container(scheme, in_features, target.with_kernels("plugin")) is not None
    return "; on this one `kernels: plugin` can" if able else ""


def _weight_only(scheme: LayerScheme, target: Target) -> tuple[str, ...]:
    weights = get_format(scheme.weight_format)
    if scheme.scales == "group":
        return ("int4",) if "int4" in target.containers and fits(weights, INT4) else ()
    return ("int8",) if fits(weights, INT8) else ()


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
    held = [CONTAINERS[name] for name in ("int8", "fp8") if name in target.containers]
    names = " or ".join(container.name for container in held)
    works = "e2m1 weights with e2m3 activations do"
    if scheme.activation_format == HIGH_PRECISION:
        return f"{scheme.weight_format} values do not fit int8; e2m1 weights do"
    in_int8 = container_product(scheme, in_features, INT8)
    if in_int8.holds_operands:
        return f"{in_int8.reason}; keep the layer in high precision with a rule `weight: none`"
    if target.kernels == "native" and container_product(scheme, in_features, FP16).holds_operands:
        works += " (fp16 would hold them, but TensorRT rounds the sums of FP16 products to FP16)"
    for name in (scheme.weight_format, scheme.activation_format):
        if not any(fits(get_format(name), container) for container in held):
            return f"{name} values do not fit {names}; {works}"
    return f"the two do not fit the same one of {', '.join(container.name for container in held)}; {works}"
