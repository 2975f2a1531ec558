"""Record what the torch fake-quant model computes: per linear, per block and as a whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from exporter.compute import Compute
from exporter.errors import FidelityError
from exporter.gate.outputs import LayerOutputs
from exporter.gate.records import OUTPUT, SHARED_PREFIX, ModelRecord, Reference, Rounding
from exporter.gate.rounding import rounded, stored_in
from exporter.gate.rows import LinearInputs, as_array
from exporter.gate.snr import snr_db
from exporter.gate.table import bounded_db
from exporter.memory import release_mapped_weights
from exporter.models.adapter import Adapter
from exporter.models.inputs import TransformerInputs, shared_inputs
from exporter.progress import Progress
from exporter.quantize import share_copy

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
            with rows.collected(), outputs.collected(), _boundaries(blocks) as seen:
                seen[OUTPUT] = adapter.forward(quantized, inputs)
            measured.append(_measure(original, quantized, adapter, inputs, seen, rows.free_samples))
            costs += [] if compute == "fp32" else [_rounding(compute, products, quantized, adapter, inputs, seen)]
            task.advance()
        linears, rounded_outputs = tuple(rows.records()), tuple(outputs.records())
        task.advance()
    names = tuple(name for name, _ in blocks)
    rounding = [record.layer for record in linears if record.activation_format != "none"]
    rounding += [record.layer for record in rounded_outputs]
    thresholds = {}
    for name in measured[0].record.boundaries:
        part = next((block for block in names if name == f"{block}.output"), None)
        thresholds[name] = _threshold([one.forced[name] for one in measured], _is_rounded(rounding, part, names))
    free = [one.free for one in measured]
    return Reference(
        linears=linears,
        models=tuple(one.record for one in measured),
        blocks=names,
        thresholds=thresholds,
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
    free_samples: int | None,
) -> _Measured:
    arrays = {name: as_array(tensor) for name, tensor in seen.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise FidelityError(f"the quantized torch model gives NaN or infinity at {name}; nothing can be compared")
    shaken = _shaken(inputs)

    def distances(expected: npt.NDArray[Any], of_original: Tensor, of_shaken: Tensor) -> _Distances:
        found = (bounded_db(snr_db(as_array(tensor), expected)) for tensor in (of_original, of_shaken))
        return _Distances(*found)

    # A block that is given its inputs is not shaken: what it gave is what it would give again.
    around = _with_known_blocks(quantized, adapter, seen)
    forced = []
    for model, given in ((original, inputs), (around, shaken)):
        with _forced(adapter.blocks(model), adapter.skips(model), seen) as own, _weights_let_go(adapter.blocks(model)):
            own[OUTPUT] = adapter.forward(model, given)
        forced.append(own)
    samples = slice(free_samples)
    with _weights_let_go(adapter.blocks(original)):
        of_original = adapter.forward(original, inputs[samples])
    release_mapped_weights()
    free = distances(arrays[OUTPUT][samples], of_original, adapter.forward(quantized, shaken[samples]))
    return _Measured(
        ModelRecord(float(inputs.timestep.flatten()[0]), dict(inputs.as_numpy()), arrays),
        {name: distances(array, forced[0][name], forced[1][name]) for name, array in arrays.items()},
        free,
    )


@contextmanager
def _weights_let_go(blocks: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Let go of mapped weights behind every block: the builder of an engine may be running beside this."""

    def let_go(_module: nn.Module, _args: Any, _output: Any) -> None:
        release_mapped_weights()

    with ExitStack() as hooks:
        for _, block in blocks:
            hooks.callback(block.register_forward_hook(let_go).remove)
        yield


class _KnownBlock(nn.Module):
    """Gives what a block gave; it has the block's parts, since a model may use some of them elsewhere."""

    def __init__(self, block: nn.Module, output: Tensor) -> None:
        super().__init__()
        self._output = (output,)
        for name, part in block.named_children():
            self.add_module(name, part)

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return self._output[0]


def _with_known_blocks(model: nn.Module, adapter: Adapter, seen: dict[str, Tensor]) -> nn.Module:
    """A copy of `model`, on the same memory, whose blocks give what was `seen` of them.

    A block with hooks of its own, which name its arguments (`GenericAdapter`), stays and runs again.
    """
    copy = share_copy(model)
    for name, block in adapter.blocks(model):
        if not block._forward_pre_hooks:  # torch has no public list of them
            copy.set_submodule(name, _KnownBlock(block, seen[f"{name}.output"]))
    return copy


def _rounding(
    compute: Compute,
    products: Compute,
    quantized: nn.Module,
    adapter: Adapter,
    inputs: TransformerInputs,
    seen: dict[str, Tensor],
) -> Rounding:
    """What the compute type costs on one batch."""
    blocks = adapter.blocks(quantized)
    given = {name: rounded(tensor, compute) for name, tensor in seen.items()}
    with stored_in(compute, quantized, blocks, products):
        with _forced(blocks, adapter.skips(quantized), given) as own:
            own[OUTPUT] = adapter.forward(quantized, inputs)
        free = adapter.forward(quantized, inputs)
    boundaries = {name: bounded_db(snr_db(as_array(seen[name]), as_array(own[name]))) for name in seen}
    return Rounding(compute, boundaries, bounded_db(snr_db(as_array(seen[OUTPUT]), as_array(free))))


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


def _threshold(distances: Sequence[_Distances], rounded: bool) -> float:
    """Least SNR of a deviation over all batches; only a rounded activation turns a trifle into a whole step."""
    limits = [EXACT_DB, *(one.sensitivity_db - SENSITIVITY_MARGIN_DB for one in distances)]
    if rounded:
        limits += [one.quantization_db + HEADROOM_DB for one in distances]
    return min(limits)


@contextmanager
def _boundaries(blocks: Sequence[tuple[str, nn.Module]]) -> Iterator[dict[str, Tensor]]:
    """Collect the first block's tensor inputs and every block's output, under the names that the graph uses."""
    seen: dict[str, Tensor] = {}
    first_name, first = blocks[0]

    def keep_inputs(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[f"{first_name}.input"] = args[0]
        seen.update(_shared(kwargs, ()))

    with ExitStack() as hooks:
        hooks.callback(first.register_forward_pre_hook(keep_inputs, with_kwargs=True).remove)
        for name, block in blocks:

            def keep_output(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
                seen[f"{name}.output"] = output

            hooks.callback(block.register_forward_hook(keep_output).remove)
        yield seen


def _shared(kwargs: dict[str, Any], skips: Collection[str]) -> dict[str, Tensor]:
    return {SHARED_PREFIX + name: value for name, value in shared_inputs(kwargs, skips).items()}


@contextmanager
def _forced(
    blocks: Sequence[tuple[str, nn.Module]], skips: Mapping[str, Mapping[str, str]], given: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Let every block, and what follows the last, see the `given` tensors; collect what the model itself computes.

    What comes by a skip is an earlier block's output, so it is given already.
    """
    own: dict[str, Tensor] = {}

    def enter(
        name: str, kwargs: dict[str, Any], args: tuple[Any, ...], hidden: Tensor, taken: Collection[str]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if name not in own:
            own[name] = args[0]
        shared = _shared(kwargs, taken)
        own.update({key: value for key, value in shared.items() if key not in own})
        forced = {key: given.get(SHARED_PREFIX + key, value) for key, value in kwargs.items()}
        return (hidden, *args[1:]), forced

    with ExitStack() as hooks:
        hidden_name = f"{blocks[0][0]}.input"
        for name, block in blocks:
            hidden, output_name = given[hidden_name], f"{name}.output"

            def before(
                _module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                hidden: Tensor = hidden,
                hidden_name: str = hidden_name,
                taken: Collection[str] = tuple(skips.get(name, ())),
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                return enter(hidden_name, kwargs, args, hidden, taken)

            def after(_module: nn.Module, _args: Any, output: Tensor, name: str = output_name) -> Tensor:
                own[name] = output
                return given[name]

            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(after).remove)
            hidden_name = output_name
        yield own
