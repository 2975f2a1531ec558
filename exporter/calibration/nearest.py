"""One layer's weight as round-to-nearest leaves it: searched scales, every weight to its nearest value."""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.calibration.block_scales import choose_block_scales, static_scale
from exporter.calibration.input_statistics import InputStatistics
from exporter.calibration.output_error import WeightSearch, search_scales
from exporter.calibration.scales import rows_at_once
from exporter.plan import LayerPlan
from exporter.quantize import QuantizedWeight, round_to_nearest
from plugins.block_scales import BlockScaling
from plugins.formats import Format, get_format


def nearest_weight(
    weight: Tensor, layer: LayerPlan, inputs: InputStatistics | None, search: WeightSearch
) -> QuantizedWeight:
    """Quantize `weight` [N, K] as `layer` says, with what calibration saw of its input, if it did.

    "output" goes by the inputs' Gram matrix. Without one, and for block scaling, it is "mse", which weighs all input
    channels alike where no inputs were seen.
    """
    fmt = get_format(layer.weight_format)
    if layer.scaling is not None:
        importance = None if inputs is None else inputs.mean_square
        scales = choose_block_scales(weight, layer.scaling, "absmax" if search == "absmax" else "mse", importance)
        return _rounded(weight, scales, fmt, input_scale(layer.scaling, inputs))
    multipliers = layer.multipliers if layer.scales == "foldable" else ()
    return _rounded(weight, search_scales(weight, fmt, layer.group_size, search, inputs, multipliers), fmt)


def _rounded(weight: Tensor, scales: Tensor, fmt: Format, input_scale: Tensor | None = None) -> QuantizedWeight:
    """What `round_to_nearest` gives, by so few rows at a time that they stay in a CPU's cache."""
    rows = rows_at_once(weight)
    parts = zip(torch.split(weight, rows), torch.split(scales, rows), strict=True)
    codes = torch.cat([round_to_nearest(*part, fmt).codes for part in parts])
    return QuantizedWeight(codes, scales.detach().cpu().contiguous(), input_scale)


def input_scale(scaling: BlockScaling, inputs: InputStatistics | None) -> Tensor | None:
    """The static scale of a layer's input, from the largest magnitude that calibration saw."""
    if not scaling.has_tensor_scale:
        return None
    return static_scale(0.0 if inputs is None else inputs.amax, scaling)
