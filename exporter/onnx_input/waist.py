"""A graph that fp4export itself exported: quantized already, to be lowered for some target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from exporter.errors import InputError
from exporter.gate.table import GateRow
from exporter.onnx_input.probe import ProbedRun, ProbePoint, run_probed
from exporter.onnx_input.selection import Selection
from exporter.passes import WAIST_PASSES, Pass, run_passes
from exporter.passes.choose import forget_containers, scales_of
from exporter.passes.driver import import_graph
from exporter.passes.layer_table import TARGET_KEY, read_layer_table
from exporter.passes.lowering import Layer, layer_of
from exporter.passes.surgery import array_of
from exporter.plan import LayerPlan
from exporter.progress import Progress
from exporter.quantize import QuantizedWeight, QuantLinear
from exporter.targets import Target


@dataclass(frozen=True)
class WaistModel:
    """An exported graph after the waist's passes for the target, and its quantized layers."""

    path: Path
    model: onnx.ModelProto
    layers: Mapping[str, Layer]
    selection: Selection

    @classmethod
    def of(cls, path: Path, model: onnx.ModelProto, target: Target) -> WaistModel:
        """Run the waist's passes, which change nothing that they did before but for the containers of another target.

        Raises `InputError`.
        """
        made_for = next((entry.value for entry in model.metadata_props if entry.key == TARGET_KEY), target.name)
        again = (forget_containers,) if made_for != target.name else ()
        waist, _ = run_passes(model, (*again, *WAIST_PASSES), target)
        found = [layer for layer in map(layer_of, import_graph(waist).nodes) if layer is not None]
        if not found:
            raise InputError(f"{path}: has fp4export's operators, but no quantized linear layer to lower")
        selection = Selection(tuple(_plan(layer) for layer in found), ())
        return cls(path, waist, {layer.name: layer for layer in found}, selection)

    def waist_passes(self, modules: Mapping[str, QuantLinear]) -> tuple[Pass, ...]:
        """No more passes: the weights are in the graph."""
        return ()

    def modules(self, progress: Progress) -> dict[str, QuantLinear]:
        """Every layer with the codes and scales that the graph holds."""
        return {plan.name: _module(self.layers[plan.name], plan) for plan in self.selection.layers}

    def probed(self, feeds: Mapping[str, npt.NDArray[Any]], folder: Path) -> ProbedRun:
        """The graph's outputs, through its function bodies, and its layers' inputs."""
        points = [
            ProbePoint(entry.layer, entry.input, entry.output, entry.in_features, entry.out_features)
            for entry in read_layer_table(self.model)
        ]
        return run_probed(self.model, points, feeds, folder, str(self.path))

    def compare_rewritten(self, run: ProbedRun, feeds: Mapping[str, npt.NDArray[Any]], folder: Path) -> list[GateRow]:
        """Nothing: the graph holds no unquantized model."""
        return []


def _plan(layer: Layer) -> LayerPlan:
    gemm = layer.gemm
    return LayerPlan(
        name=layer.name,
        out_features=len(layer.weight_scales),
        in_features=gemm.count,
        has_bias=gemm.has_bias,
        weight_format=gemm.weight_format,
        activation_format=gemm.activation_format,
        group_size=gemm.group_size,
        scales=scales_of(gemm),
        container=layer.container,
    )


def _module(layer: Layer, plan: LayerPlan) -> QuantLinear:
    scales = layer.weight_scales
    if layer.multipliers is not None:
        scales = scales * layer.multipliers.astype(np.float32)
    weight = QuantizedWeight(torch.from_numpy(layer.codes().copy()), torch.from_numpy(scales.copy()))
    bias = None if layer.bias is None else array_of(layer.bias)
    return QuantLinear(plan, weight, None if bias is None else torch.from_numpy(bias.copy()))
