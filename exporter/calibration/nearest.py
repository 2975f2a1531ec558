"""One layer's weight as round-to-nearest leaves it: searched scales, every weight to its nearest value."""

from __future__ import annotations

from torch import Tensor

from exporter.calibration.scales import ScaleSearch, choose_scales
from exporter.plan import LayerPlan
from exporter.quantize import QuantizedWeight, round_to_nearest
from plugins.formats import get_format


def nearest_weight(weight: Tensor, layer: LayerPlan, importance: Tensor | None, search: ScaleSearch) -> QuantizedWeight:
    """Quantize `weight` [N, K] as `layer` says; `importance` [K] is as in `choose_scales`."""
    fmt = get_format(layer.weight_format)
    multipliers = layer.multipliers if layer.scales == "foldable" else ()
    scales = choose_scales(weight, fmt, layer.group_size, search, importance, multipliers)
    return round_to_nearest(weight, scales, fmt)
