"""Whether this machine's CPU computes the products that a graph for CPUs relies on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from exporter.container_choice import container_product, needs_vnni
from exporter.device.machine import saturates_int8_products
from exporter.errors import EnvironmentLacksError
from exporter.layer_entries import LayerEntry
from exporter.layer_section import Scales
from exporter.presets import LayerScheme
from exporter.targets import Target
from plugins.block_scales import BLOCK_SCALINGS
from plugins.container_product import ContainerProduct
from plugins.containers import CONTAINERS


def refuse_saturating_cpu(products: Mapping[str, ContainerProduct | None], target: Target, where: str) -> None:
    """Raise `EnvironmentLacksError`, beginning with `where`, if this CPU saturates a layer's products, so that a
    comparison here could only fail. `products`: what each layer's product in its container is, None where none is
    stated."""
    layers = [layer for layer, product in products.items() if needs_vnni(product)]
    if target.engine != "onnxruntime" or not layers or not saturates_int8_products():
        return
    raise EnvironmentLacksError(
        f"{where}: {len(layers)} layers ({layers[0]} first) multiply with int8 activations, which is exact on x86 CPUs "
        "with VNNI only, and this CPU has none, so that validation would fail here; use e2m3 activations (preset "
        "w4a6), which are exact on every CPU, or validate on a CPU with VNNI, or export with --no-validate"
    )


def product_of(entry: LayerEntry) -> ContainerProduct | None:
    """What the product of a graph's layer in its container is; None for block scaling."""
    if entry.scales in BLOCK_SCALINGS:
        return None
    scheme = LayerScheme(entry.weight_format, entry.group_size, cast(Scales, entry.scales), entry.activation_format)
    return container_product(scheme, entry.in_features, CONTAINERS[entry.container])
