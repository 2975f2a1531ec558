"""The rounding that a method begins with, before anything is learned; and what it has to know of the layers' inputs."""

from __future__ import annotations

from torch import Tensor

from exporter.calibration.gptq import ErrorFeedback, round_with_feedback
from exporter.calibration.input_statistics import InputStatistics
from exporter.calibration.nearest import nearest_weight
from exporter.calibration.output_error import LARGEST_GRAM
from exporter.method_section import MethodSection
from exporter.plan import LayerPlan, Plan
from exporter.quantize import QuantizedWeight
from plugins.formats import UNSIGNED_ACTIVATION_FORMATS


def feeds_back(method: MethodSection) -> bool:
    """Whether weights are rounded with error feedback, at last or to begin with."""
    return method.name == "gptq" or (method.name == "fp4dit" and method.start == "gptq")


def looks_at_inputs(plan: Plan, method: MethodSection) -> bool:
    """Whether the layers' inputs have to be known: for the search of scales, for a static scale of them, or because
    their format has no sign."""
    static = any(layer.scaling is not None and layer.scaling.has_tensor_scale for layer in plan.layers)
    unsigned = any(layer.activation_format in UNSIGNED_ACTIVATION_FORMATS for layer in plan.layers)
    return static or unsigned or method.scale_search != "absmax"


def largest_gram(plan: Plan, method: MethodSection) -> int:
    """The longest rows whose Gram matrix is needed: error feedback takes that of all, the search of short ones."""
    if feeds_back(method):
        return max((layer.in_features for layer in plan.layers), default=0)
    searched = method.scale_search == "output" and any(layer.scaling is None for layer in plan.layers)
    return LARGEST_GRAM if searched else 0


def first_rounding(
    weight: Tensor, layer: LayerPlan, inputs: InputStatistics | None, method: MethodSection
) -> QuantizedWeight:
    """What `weight` [N, K] is before the method has learned anything: rounded to nearest, or with error feedback where
    the method begins so and the layer's inputs are known."""
    nearest = nearest_weight(weight, layer, inputs, method.scale_search)
    if not feeds_back(method) or inputs is None or inputs.gram is None:
        return nearest
    return round_with_feedback(layer, weight, nearest, ErrorFeedback.of(inputs.gram))[0]
