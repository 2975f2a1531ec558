"""Record what the torch fake-quant model computes: per linear, per block and as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from exporter.compute import Compute
from exporter.errors import FidelityError
from exporter.gate.forced import boundaries_of, run_forced, weights_let_go, with_known_blocks
from exporter.gate.outputs import LayerOutputs
from exporter.gate.records import OUTPUT, ModelRecord, Reference, Rounding
from exporter.gate.rounding import rounded, stored_in
from exporter.gate.rows import LinearInputs, as_array
from exporter.gate.snr import snr_db
from exporter.gate.table import bounded_db
from exporter.memory import release_mapped_weights
from exporter.models.adapter import Adapter
from exporter.models.inputs import TransformerInputs
from exporter.progress import Progress

# Where nothing is quantized on the way, two float32 computations agree at least this well.
EXACT_DB = 100.0
# How far a deviation must stay below the quantization error where codes may flip on the way.
HEADROOM_DB = 10.0
# The reference's own answer to a change of its inputs that is as small as rounding: relative noise on the latents,
# one float32 step on the timestep, whose embedding takes sines of up to a thousand radians. Two correct computations
# differ by about as much, so no more than this, with a margin, can be asked for.
INPUT_NOISE = 1e-6
SENSITIVITY_MARGIN_DB = 6.0


@torch.no_grad()
def record_reference(
    original: nn.Module,
    quantized: nn.Module,
    adapter: Adapter,
    batches: Sequence[TransformerInputs],
    progress: Progress,
    compute: Compute = "fp32",
    products: Compute = "fp32",
) -> Reference:
    """Run both models on `batches` (one timestep each) and keep what the gate compares with.

    `original` tells how large the quantization error is: of the whole model, and of every block on the quantized
    model's own inputs. With a `compute` type other than FP32 the linears' inputs are rounded to it, and what it costs
    is measured, together with rounding the linears' products to `products`.
    """
    blocks = adapter.blocks(quantized)
    rows = LinearInputs.of(quantized, len(batches), compute, products)
    outputs = LayerOutputs.of(quantized, len(batches), compute)
    measured, costs = [], []
    with progress.task("recording the reference", len(batches) + 1) as task:
        for batch in batches:
            inputs = adapter.with_conditions(quantized, batch)
            with rows.collected(), outputs.collected(), boundaries_of(blocks) as seen:
                seen[OUTPUT] = adapter.forward(quantized, inputs)
            parts = _parts(inputs.batch, rows.free_samples)
            measured.append(_measure(original, quantized, adapter, inputs, seen, parts))
            if compute != "fp32":
                costs.append(_rounding(compute, products, quantized, adapter, inputs, seen, parts))
            task.advance()
        linears, rounded_outputs = tuple(rows.records()), tuple(outputs.records())
        task.advance()
    names = tuple(name for name, _ in blocks)
    rounding = [record.layer for record in linears if record.activation_format != "none"]
    rounding += [record.layer for record in rounded_outputs]
    free = [one.free for one in measured]
    return Reference(
        linears=linears,
        models=tuple(one.record for one in measured),
        blocks=names,
        thresholds=_thresholds(measured, rounding, names),
        end_to_end_threshold=_threshold(free, bool(rounding)),
        quantization_db=min(one.quantization_db for one in free),
        sensitivity_db=min(one.sensitivity_db for one in free),
        rounding=_worst(costs),
        outputs=rounded_outputs,
        free_samples=rows.free_samples,
    )


@dataclass(frozen=True)
class _Distances:
    """How far a result is from the original model's, and from its own on inputs changed as little as rounding does."""

    quantization_db: float
    sensitivity_db: float


@dataclass(frozen=True)
class _Measured:
    """One batch: the reference, and distances of every boundary when inputs are given, and of the output when not."""

    record: ModelRecord
    forced: dict[str, _Distances]
    free: _Distances


def _measure(
    original: nn.Module,
    quantized: nn.Module,
    adapter: Adapter,
    inputs: TransformerInputs,
    seen: dict[str, Tensor],
    parts: Sequence[slice],
) -> _Measured:
    """`parts` are the samples that are judged on their own when running free, of which the worst counts."""
    arrays = {name: as_array(tensor) for name, tensor in seen.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise FidelityError(f"the quantized torch model gives NaN or infinity at {name}; nothing can be compared")
    shaken = _shaken(inputs)

    def distances(expected: npt.NDArray[Any], of_original: Tensor, of_shaken: Tensor) -> _Distances:
        found = (bounded_db(snr_db(as_array(tensor), expected)) for tensor in (of_original, of_shaken))
        return _Distances(*found)

    # A block that is given its inputs is not shaken: what it gave is what it would give again.
    around = with_known_blocks(quantized, adapter, seen)
    forced_shaken = run_forced(around, adapter, shaken, seen)
    with weights_let_go(adapter.blocks(original)):
        forced_original = run_forced(original, adapter, inputs, seen)
        of_original = adapter.forward(original, inputs)
    release_mapped_weights()
    of_shaken = adapter.forward(quantized, shaken)
    free = [distances(arrays[OUTPUT][part], of_original[part], of_shaken[part]) for part in parts]
    return _Measured(
        ModelRecord(float(inputs.timestep.flatten()[0]), dict(inputs.as_numpy()), arrays),
        {name: distances(array, forced_original[name], forced_shaken[name]) for name, array in arrays.items()},
        _Distances(min(one.quantization_db for one in free), min(one.sensitivity_db for one in free)),
    )


def _parts(batch: int, free_samples: int | None) -> list[slice]:
    """The whole batch, or where graphs run free on some of it, as many samples at a time: what is compared later may be
    any of them, or all."""
    return [slice(start, start + (free_samples or batch)) for start in range(0, batch, free_samples or batch)]


def _rounding(
    compute: Compute,
    products: Compute,
    quantized: nn.Module,
    adapter: Adapter,
    inputs: TransformerInputs,
    seen: dict[str, Tensor],
    parts: Sequence[slice],
) -> Rounding:
    """What the compute type costs on one batch, running free on the worst of its `parts`."""
    given = {name: rounded(tensor, compute) for name, tensor in seen.items()}
    with stored_in(compute, quantized, adapter.blocks(quantized), products):
        own = run_forced(quantized, adapter, inputs, given)
        free = adapter.forward(quantized, inputs)
    boundaries = {name: bounded_db(snr_db(as_array(seen[name]), as_array(own[name]))) for name in seen}
    expected, found = as_array(seen[OUTPUT]), as_array(free)
    return Rounding(compute, boundaries, min(bounded_db(snr_db(expected[part], found[part])) for part in parts))


def _worst(costs: Sequence[Rounding]) -> Rounding | None:
    """Every boundary's worst over the batches; None without any."""
    if not costs:
        return None
    boundaries = {name: min(cost.boundaries[name] for cost in costs) for name in costs[0].boundaries}
    return Rounding(costs[0].compute, boundaries, min(cost.end_to_end_db for cost in costs))


def _shaken(inputs: TransformerInputs) -> TransformerInputs:
    """`inputs` with relative noise on the latents and the next larger timesteps."""
    latents, generator = inputs.hidden_states, torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timestep = torch.nextafter(inputs.timestep, torch.full_like(inputs.timestep, torch.inf))
    return replace(inputs, hidden_states=latents * (1 + INPUT_NOISE * noise), timestep=timestep)


def _is_rounded(rounding: Sequence[str], block: str | None, blocks: Sequence[str]) -> bool:
    """Whether one of the layers that are `rounding` what they read or give is in `block`, or for None outside all."""
    return any(next((b for b in blocks if layer.startswith(f"{b}.")), None) == block for layer in rounding)


def _thresholds(measured: Sequence[_Measured], rounding: Sequence[str], blocks: Sequence[str]) -> dict[str, float]:
    """Least SNR of every boundary when the reference's inputs are given; `rounding` are the layers that round."""
    thresholds = {}
    for name in measured[0].record.boundaries:
        part = next((block for block in blocks if name == f"{block}.output"), None)
        thresholds[name] = _threshold([one.forced[name] for one in measured], _is_rounded(rounding, part, blocks))
    return thresholds


def _threshold(distances: Sequence[_Distances], rounded: bool) -> float:
    """Least SNR of a deviation over all batches; only a rounded activation turns a trifle into a whole step."""
    limits = [EXACT_DB, *(one.sensitivity_db - SENSITIVITY_MARGIN_DB for one in distances)]
    if rounded:
        limits += [one.quantization_db + HEADROOM_DB for one in distances]
    return min(limits)
