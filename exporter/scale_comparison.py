"""What the choice of scales costs: channel, free group and foldable scales of the same layers, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from exporter.calibration.input_statistics import InputStatistics
from exporter.calibration.nearest import nearest_weight
from exporter.container_choice import choose_container
from exporter.cores import on_every_core
from exporter.errors import InputError
from exporter.gate.snr import snr_db
from exporter.gate.table import bounded_db
from exporter.layer_bytes import stored_bytes
from exporter.layer_section import Scales
from exporter.method_section import MethodSection
from exporter.plan import LayerPlan
from exporter.quantize import planned_linear
from exporter.targets import Target
from plugins.formats import get_format

COMPARED: tuple[Scales, ...] = ("channel", "group", "foldable")
"""The kinds that any formats may have, in this order; block scaling comes with formats of its own and is left out."""

EVERY_CHANNEL = 32
"""Every how-manieth output channel is compared: a row's scales depend on no other row, so that a sample costs one."""


@dataclass(frozen=True)
class ScaleKind:
    """One kind of scales for one layer: SNR in dB of the sampled outputs with the weight rounded to nearest, the
    layer's stored bytes, and the container it would run in on the target ("" where the target refuses it)."""

    kind: Scales
    snr_db: float
    stored_bytes: int
    container: str
    exact: bool

    @property
    def runs_in(self) -> str:
        """In words: ``int8, exact``, ``fp32``, or ``refused``."""
        if not self.container:
            return "refused"
        return f"{self.container}, exact" if self.exact else self.container


@dataclass(frozen=True)
class LayerScales:
    """The kinds that a layer's formats allow; `chosen` is the recipe's."""

    layer: str
    chosen: Scales
    kinds: tuple[ScaleKind, ...]


def compare_scales(
    original: nn.Module, layers: Iterable[LayerPlan], rows: Mapping[str, Tensor], method: MethodSection, target: Target
) -> tuple[LayerScales, ...]:
    """Search and round every kind of scales for the layers that have groups, and measure the outputs' error.

    `rows` are inputs [R, K] of each layer in the original model: every other one is searched on, the rest is measured
    on. Only every `EVERY_CHANNEL`-th output channel is looked at. Weights are rounded to nearest whatever the method,
    and activations are not quantized, so that the scales alone differ. The search goes by mean squares at most: the
    rows are too few for a Gram matrix.
    """

    def compared(layer: LayerPlan) -> LayerScales:
        weight = planned_linear(original, layer).weight.detach()[::EVERY_CHANNEL]
        kinds = [_measure(weight, kind, rows[layer.name], method, target) for kind in _kinds(layer, target)]
        return LayerScales(layer.name, layer.scales, tuple(kinds))

    return tuple(on_every_core(compared, [layer for layer in layers if layer.group_size and layer.scaling is None]))


def _kinds(layer: LayerPlan, target: Target) -> list[tuple[LayerPlan, bool]]:
    """The layer with every kind of scales, and whether the target runs it so."""
    kinds = []
    for scales in COMPARED:
        other = replace(layer, scales=scales, group_size=0 if scales == "channel" else layer.group_size)
        try:
            container = choose_container(layer.name, other.scheme, layer.in_features, target)
        except InputError:
            kinds.append((other, False))
            continue
        other = replace(other, container=container)
        if scales != "foldable" or len(other.multipliers) > 1:
            kinds.append((other, True))
    return kinds


def _measure(
    weight: Tensor, kind: tuple[LayerPlan, bool], rows: Tensor, method: MethodSection, target: Target
) -> ScaleKind:
    layer, runs = kind
    fmt, searched, measured = get_format(layer.weight_format), rows[::2], rows[1::2]
    least, largest = (float(end) for end in searched.aminmax())
    statistics = InputStatistics(searched.square().mean(dim=0), max(largest, -least), least)
    rounded = nearest_weight(weight, layer, statistics, method.scale_search).dequantize(fmt)
    return ScaleKind(
        kind=layer.scales,
        snr_db=bounded_db(snr_db((measured @ weight.T).numpy(force=True), (measured @ rounded.T).numpy(force=True))),
        stored_bytes=stored_bytes(layer, target),
        container=layer.container if runs else "",
        exact=runs and layer.product is not None and layer.product.exact,
    )


@dataclass(frozen=True)
class ScaleSummary:
    """One kind of scales over all layers that allow it: mean of their output SNRs in dB, their stored bytes, and in
    words what they would run in."""

    kind: Scales
    layers: int
    mean_db: float
    stored_bytes: int
    runs_in: str


def summarize(compared: Sequence[LayerScales]) -> tuple[ScaleSummary, ...]:
    """The kinds in a recipe's order, over the layers that allow every kind that any layer allows."""
    found = [entry for layer in compared for entry in layer.kinds]
    names = [name for name in COMPARED if any(entry.kind == name for entry in found)]
    complete = [layer for layer in compared if len(layer.kinds) == len(names)]
    summaries = []
    for name in names:
        kinds = [entry for layer in complete for entry in layer.kinds if entry.kind == name]
        runs = sorted({entry.runs_in for entry in kinds})
        mean = float(np.mean([entry.snr_db for entry in kinds])) if kinds else 0.0
        summaries.append(
            ScaleSummary(name, len(kinds), mean, sum(entry.stored_bytes for entry in kinds), " or ".join(runs))
        )
    return tuple(summaries)
