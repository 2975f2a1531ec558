"""Someone else's ONNX model: its linear layers are found, rounded to nearest and put into the waist's form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from exporter.calibration.nearest import nearest_weight
from exporter.errors import InputError
from exporter.gate.table import GateRow
from exporter.onnx_input.compare import check_reading, compare_rewritten
from exporter.onnx_input.insert import StoredWeight, quantizer_insertion
from exporter.onnx_input.linears import FoundLinear, find_linears
from exporter.onnx_input.model import prepared
from exporter.onnx_input.probe import ProbedRun, ProbePoint, run_probed
from exporter.onnx_input.selection import FormatOptions, Selection, select_layers
from exporter.passes import WAIST_PASSES, Pass
from exporter.passes.driver import import_graph
from exporter.plan import LayerPlan
from exporter.progress import Progress
from exporter.quantize import QuantizedWeight, QuantLinear
from exporter.targets import Target


@dataclass(frozen=True)
class ForeignModel:
    """A plain ONNX model, as the passes take it, and what becomes of every linear layer."""

    path: Path
    model: onnx.ModelProto
    linears: Mapping[str, FoundLinear]
    selection: Selection
    target: Target

    @classmethod
    def of(cls, path: Path, model: onnx.ModelProto, options: FormatOptions, target: Target) -> ForeignModel:
        """Find the linear layers and decide about them. Raises `InputError`."""
        ready = prepared(model, str(path), target)
        linears = find_linears(import_graph(ready))
        selection = select_layers(linears, options, target, str(path))
        return cls(path, ready, {linear.name: linear for linear in linears}, selection, target)

    def waist_passes(self, modules: Mapping[str, QuantLinear]) -> tuple[Pass, ...]:
        """The passes that make the waist of the model, the layers' weights being those of `modules`."""
        first: dict[tuple[str, bool, float], str] = {}
        weights = {}
        for layer in self.selection.layers:
            linear, module = self.linears[layer.name], modules[layer.name]
            # Layers that read the same constant in the same way share their codes.
            key = (linear.first.inputs[1].name, linear.transposes_weight, linear.alpha)
            weights[layer.name] = StoredWeight(
                layer,
                module.codes.numpy(),
                module.scales.numpy(),
                None if module.bias is None else module.bias.numpy(),
                first.setdefault(key, layer.name),
            )
        return (quantizer_insertion(weights), *WAIST_PASSES)

    def modules(self, progress: Progress) -> dict[str, QuantLinear]:
        """Every selected layer with its weight rounded to nearest on searched scales; the model has no inputs that
        were captured, so all input channels count alike. Raises `InputError` for a weight that is not finite.
        """
        modules = {}
        with progress.task("scales", len(self.selection.layers)) as task:
            for layer in self.selection.layers:
                modules[layer.name] = self._quantized(self.linears[layer.name], layer)
                task.advance()
        return modules

    def _quantized(self, linear: FoundLinear, layer: LayerPlan) -> QuantLinear:
        array, bias = linear.weight(), linear.bias_values()
        if not np.isfinite(array).all():
            raise InputError(
                f"{self.path}: {layer.name}: its weight holds NaN or infinity, which cannot be quantized; "
                f"keep it with --keep '{layer.name}'"
            )
        weight: QuantizedWeight = nearest_weight(torch.from_numpy(array.copy()), layer, None, "mse")
        return QuantLinear(layer, weight, None if bias is None else torch.from_numpy(bias.copy()))

    def probed(self, feeds: Mapping[str, npt.NDArray[Any]], folder: Path) -> ProbedRun:
        """The model's own outputs and its layers' inputs. Raises `FidelityError` for a layer that was misread."""
        points = [self._point(self.linears[layer.name]) for layer in self.selection.layers]
        run = run_probed(self.model, points, feeds, folder, str(self.path))
        for layer in self.selection.layers:
            check_reading(self.linears[layer.name], run.layers[layer.name])
        return run

    def compare_rewritten(self, run: ProbedRun, feeds: Mapping[str, npt.NDArray[Any]], folder: Path) -> list[GateRow]:
        """The waist's passes, nothing quantized, against the model as it was given."""
        return [compare_rewritten(self.model, WAIST_PASSES, run.outputs, feeds, folder, self.target)]

    def _point(self, linear: FoundLinear) -> ProbePoint:
        return ProbePoint(
            linear.name,
            linear.x.name,
            linear.y.name,
            linear.in_features,
            linear.out_features,
            linear.transposes_input,
        )
