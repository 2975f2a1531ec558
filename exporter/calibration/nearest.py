"""One layer's weight as round-to-nearest leaves it: searched scales, every weight to its nearest value."""

from __future__ import annotations

from torch import Tensor

from exporter.calibration.block_scales import choose_block_scales, static_scale
from exporter.calibration.inputs import InputStatistics
from exporter.calibration.scales import ScaleSearch, choose_scales
from exporter.plan import LayerPlan
from exporter.quantize import QuantizedWeight, round_to_nearest
from plugins.block_scales import BlockScaling
from plugins.formats import get_format


def nearest_weight(
    weight: Tensor, layer: LayerPlan, inputs: InputStatistics | None, search: ScaleSearch
) -> QuantizedWeight:
    """Quantize `weight` [N, K] as `layer` says, with what calibration saw of its input, if it did."""
    fmt = get_format(layer.weight_format)
    importance = None if inputs is None else inputs.mean_square
    if layer.scaling is not None:
        scales = choose_block_scales(weight, layer.scaling, search, importance)
        return round_to_nearest(weight, scales, fmt, _input_scale(layer.scaling, inputs))
    multipliers = layer.multipliers if layer.scales == "foldable" else ()
    scales = choose_scales(weight, fmt, layer.group_size, search, importance, multipliers)
    return round_to_nearest(weight, scales, fmt)


def _input_scale(scaling: BlockScaling, inputs: InputStatistics | None) -> Tensor | None:
    """The static scale of a layer's input, from the largest magnitude that calibration saw."""
    if not scaling.has_tensor_scale:
        return None
    return static_scale(0.0 if inputs is None else inputs.amax, scaling)
