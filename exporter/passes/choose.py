"""The number container that each low-bit linear is multiplied in."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from exporter.container_choice import choose_container, container_product, has_kernel
from exporter.errors import InputError
from exporter.layer_section import Scales
from exporter.passes.surgery import array_of, variant_of
from exporter.presets import LayerScheme
from exporter.targets import Target
from plugins.containers import CONTAINERS
from plugins.domain import AUTO_CONTAINER
from plugins.op import Gemm


def choose_containers(graph: gs.Graph, target: Target) -> int:
    """FloatGemm → FloatGemm with attribute `container`: the one asked for, else the target's best.

    Raises `InputError` naming the layer when it is exact in none, or not in the one asked for, or when the multipliers
    it was folded to are not exact in the one chosen.
    """
    changed = 0
    for node in graph.nodes:
        gemm = variant_of(node, Gemm)
        if gemm is None:
            continue
        scheme = scheme_of(node, gemm)
        container = choose_container(node.attrs["layer"], scheme, gemm.count, target)
        if not (target.kernels == "plugin" and has_kernel(scheme, gemm.count)):
            _check_multipliers(node, gemm, scheme, container, target)
        changed += node.attrs["container"] != container
        node.attrs["container"] = container
    return changed


def forget_containers(graph: gs.Graph, target: Target) -> int:
    """FloatGemm with attribute `container` → FloatGemm without, so that the next choice is the target's own.

    For a graph whose containers were chosen for another target, where they cannot be told from ones asked for.
    """
    changed = 0
    for node in graph.nodes:
        if variant_of(node, Gemm) is not None and node.attrs["container"]:
            node.attrs["container"] = ""
            changed += 1
    return changed


def scheme_of(node: gs.Node, gemm: Gemm) -> LayerScheme:
    """How the layer of a FloatGemm node is quantized, with the container that the node has so far."""
    asked = node.attrs["container"] or AUTO_CONTAINER
    return LayerScheme(gemm.weight_format, gemm.group_size, scales_of(gemm), gemm.activation_format, asked)


def scales_of(gemm: Gemm) -> Scales:
    """What a recipe calls the layer's weight scales."""
    if gemm.scaling is not None:
        return "nvfp4" if gemm.scaling.name == "nvfp4" else "mx"
    if gemm.has_multipliers:
        return "foldable"
    return "group" if gemm.has_group_scales else "channel"


def _check_multipliers(node: gs.Node, gemm: Gemm, scheme: LayerScheme, container: str, target: Target) -> None:
    if not gemm.has_multipliers or container not in CONTAINERS:
        return
    factors = array_of(node.inputs[gemm.input_names.index("multipliers")])
    if factors is None:
        return
    found = tuple(int(multiplier) for multiplier in np.unique(factors))
    wrong = container_product(scheme, gemm.count, CONTAINERS[container], found).unheld_multipliers
    if wrong:
        raise InputError(
            f"{node.attrs['layer']}: its group scales are {wrong[0]} times the channel's, which {gemm.weight_format} "
            f"in {container} (target {target.name}) does not hold; calibrate for this target, or use `scales: channel`"
        )
