"""Small graphs lowered to plugins, run in ONNX Runtime through their function bodies."""

from __future__ import annotations

import numpy as np
import onnx

from exporter.compute import Compute
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.emulate import emulation_passes
from exporter.targets import TARGETS, Target
from tests.exporter.passes.waist_graphs import WaistGraph

PLUGIN_TARGETS = {name: target.with_kernels("plugin") for name, target in TARGETS.items() if target.plugin_containers}


def lowered(model: onnx.ModelProto, target: str = "orin", compute: Compute = "fp32") -> onnx.ModelProto:
    """The exporter's graph through the waist's passes and those of a target with plugins."""
    machine = PLUGIN_TARGETS[target]
    waist, _ = run_passes(model, WAIST_PASSES, machine)
    return run_passes(waist, lowering_passes(machine, compute), machine)[0]


def opened(model: onnx.ModelProto, target: str = "orin") -> onnx.ModelProto:
    """What the gate compares in a lowered graph's place."""
    machine: Target = PLUGIN_TARGETS[target]
    return run_passes(model, emulation_passes(machine), machine)[0]


def kinds(model: onnx.ModelProto) -> list[str]:
    """The graph's operators, those of ours without their formats and sizes."""
    return [node.op_type.split("_")[0] for node in model.graph.node]


def endings(model: onnx.ModelProto, kind: str) -> list[str]:
    """What the names of our operators of a kind say after K and the groups."""
    names = [node.op_type for node in model.graph.node if node.op_type.startswith(f"{kind}_")]
    return ["_".join(part for part in name.split("_") if part in ("bias", "gelu", "residual")) for name in names]


class PluginGraph(WaistGraph):
    """A waist graph with what surrounds linears in a transformer's block."""

    def norm(self, x: str, *weights: str, **changes: float | int) -> str:
        """LayerNormalization over K as PixArt has it, its weight 1 unless given."""
        inputs = weights or (self.constant(f"ones{self.count}", np.ones(self.count, np.float32)),)
        attributes: dict[str, float | int] = {"axis": -1, "epsilon": 1e-6, **changes}
        return self.node("LayerNormalization", x, *inputs, output="normed", **attributes)

    def per_sample(self, x: str, output: str) -> str:
        """Some row for every sample, [batch, 1, K]."""
        return self.node("ReduceMean", x, self.constant("tokens_axis", np.array([1])), output=output, keepdims=1)

    def one_sample(self, x: str) -> str:
        """The mean of all samples, [1, T, K]."""
        return self.node("ReduceMean", x, self.constant("batch_axis", np.array([0])), output="one_sample", keepdims=1)

    def modulated(self, x: str, scale: str, shift: str, **changes: float | int) -> str:
        """x normalized, times scale, plus shift."""
        product = self.node("Mul", self.norm(x, **changes), scale, output="scaled")
        return self.node("Add", product, shift, output="shifted")

    def row(self, name: str, seed: int = 0) -> str:
        """A constant [1, 1, K]."""
        return self.constant(name, np.random.default_rng(seed).standard_normal((1, 1, self.count)).astype(np.float32))
