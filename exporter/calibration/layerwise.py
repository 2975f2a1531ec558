"""Units of a calibration whose layers are each quantized on their own: scales and nearest values, error feedback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from exporter.calibration.finished import FinishedUnits
from exporter.calibration.gptq import ErrorFeedback, round_with_feedback
from exporter.calibration.input_parts import InputParts
from exporter.calibration.input_statistics import InputStatistics
from exporter.calibration.nearest import nearest_weight
from exporter.calibration.output_error import WeightSearch
from exporter.calibration.placement import Placement
from exporter.memory import release_mapped_weights
from exporter.plan import LayerPlan, Plan
from exporter.progress import Progress, Task
from exporter.quantize import CalibrationResult, QuantizedWeight, planned_linear
from exporter.shards import Shard

Inputs = Mapping[str, InputStatistics]

# So many layers' scales are a unit; after it their original weights, which are not looked at again, leave the memory.
_LAYERS_AT_ONCE = 48


@dataclass(frozen=True)
class LayerUnits:
    """The planned layers of `model`, and what can be known of their `inputs`; None if nothing need be."""

    model: nn.Module
    plan: Plan
    inputs: InputParts | None
    placement: Placement
    progress: Progress
    finished: FinishedUnits
    shard: Shard

    def nearest(self, search: WeightSearch) -> Mapping[str, QuantizedWeight]:
        """Choose scales and round to nearest."""

        def nearest(layers: Sequence[LayerPlan], inputs: Inputs, task: Task) -> CalibrationResult:
            def quantized(layer: LayerPlan) -> QuantizedWeight:
                seen = inputs.get(layer.name)
                on_device = None if seen is None else seen.to(self.placement.device)
                return nearest_weight(self._weight(layer), layer, on_device, search)

            weights = {}
            for layer, weight in zip(layers, self.placement.each(quantized, layers), strict=True):
                weights[layer.name] = weight
                task.advance()
            release_mapped_weights()
            return CalibrationResult(weights)

        return self._some_at_once("scales", nearest).weights

    def with_feedback(self, weights: Mapping[str, QuantizedWeight]) -> CalibrationResult:
        """Round again with error feedback; a layer that never ran, so that its inputs are not known, stays as it is."""

        def fed_back(layers: Sequence[LayerPlan], inputs: Inputs, task: Task) -> CalibrationResult:
            rounded, statistics = {layer.name: weights[layer.name] for layer in layers}, []
            last: tuple[Tensor, ErrorFeedback] | None = None
            for layer in layers:
                seen = inputs.get(layer.name)
                if seen is not None and seen.gram is not None:
                    # Layers that share an input come one after the other and share what is made of it.
                    if last is None or last[0] is not seen.gram:
                        last = None
                        last = seen.gram, ErrorFeedback.of(seen.gram.to(self.placement.device))
                    nearest = weights[layer.name]
                    rounded[layer.name], gained = round_with_feedback(layer, self._weight(layer), nearest, last[1])
                    statistics.append(gained)
                task.advance()
            return CalibrationResult(rounded, tuple(statistics))

        return self._some_at_once("error feedback", fed_back)

    def _weight(self, layer: LayerPlan) -> Tensor:
        return planned_linear(self.model, layer).weight.detach().to(self.placement.device)

    def _some_at_once(
        self, title: str, work: Callable[[Sequence[LayerPlan], Inputs, Task], CalibrationResult]
    ) -> CalibrationResult:
        """`work` on all layers, `_LAYERS_AT_ONCE` as a unit, by the first process."""

        def done(layers: Sequence[LayerPlan], task: Task) -> CalibrationResult:
            # All processes have their share of the inputs.
            parts = [(layers, {})] if self.inputs is None else self.inputs.of(layers)
            return _together([work(*part, task) for part in parts if self.shard.is_first])

        units = []
        planned = self.plan.layers
        with self.progress.task(title, len(planned)) as task:
            for start in range(0, len(planned), _LAYERS_AT_ONCE):
                layers = planned[start : start + _LAYERS_AT_ONCE]
                unit = self.finished.find(title, layers)
                if unit is None:
                    unit = self.finished.keep(title, layers, done(layers, task))
                else:
                    task.advance(len(layers))
                units.append(unit)
        return _together(units)


def _together(results: Sequence[CalibrationResult]) -> CalibrationResult:
    weights = {name: weight for result in results for name, weight in result.weights.items()}
    return CalibrationResult(weights, tuple(statistics for result in results for statistics in result.blocks))
