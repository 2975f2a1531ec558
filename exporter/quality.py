"""How far quantization moves the model: noise predictions, single layers, and finished samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.calibration.capture import CalibrationSet
from exporter.cores import on_every_core
from exporter.decoded_weights import unpacked_weight
from exporter.errors import InputError
from exporter.gate.snr import power_ratio_db
from exporter.gate.table import bounded_db
from exporter.memory import release_mapped_weights
from exporter.models.prompts import Prompts
from exporter.plan import LayerPlan, Plan
from exporter.progress import Progress
from exporter.quantize import QuantLinear, planned_linear
from exporter.rounding import dequantize
from exporter.runtime import OnnxSession
from exporter.sampling import Denoiser
from plugins.container_product import ContainerProduct
from plugins.formats import get_format

BATCH = 32
"""Noise predictions that are made at once."""

_LAYER_ROWS = 512
# A large model's layers get fewer rows, so that they cost no more than one of its noise predictions.
_MOST_NUMBERS = 64_000_000
_FEWEST_ROWS = 32
# Of a wide layer about so many output channels are looked at, evenly spread: a channel's error is its own.
_LAYER_CHANNELS = 256
# After so many layers the original's weights, which are not looked at again, leave the memory.
_LAYERS_AT_ONCE = 48


@dataclass(frozen=True)
class StepSnr:
    """Noise-prediction SNR in dB at one sampling step: over all inputs, with the prompt, and without (NaN: none)."""

    step: int
    timestep: float
    snr_db: float
    conditional_db: float
    unconditional_db: float


@dataclass(frozen=True)
class NoiseSnr:
    """The steps of one sampling schedule, in order."""

    steps: tuple[StepSnr, ...]

    @property
    def mean_db(self) -> float:
        """Mean of the steps' decibels."""
        return float(np.mean([step.snr_db for step in self.steps]))

    @property
    def worst_db(self) -> float:
        """The smallest of the steps' decibels."""
        return min(step.snr_db for step in self.steps)


def noise_prediction_snr(
    original: Denoiser,
    quantized: Denoiser,
    held_out: CalibrationSet,
    prompts: Prompts,
    progress: Progress,
    *,
    batch_size: int = BATCH,
) -> NoiseSnr:
    """Compare both models' noise predictions on the same inputs: `held_out`, captured from the original model with a
    seed that calibration has not seen. Per step Σ eps² / Σ (eps − eps_quantized)² over all its inputs.
    """
    signal, noise = torch.zeros(len(held_out), dtype=torch.float64), torch.zeros(len(held_out), dtype=torch.float64)
    batches = torch.split(torch.arange(len(held_out)), batch_size)
    with torch.no_grad(), progress.task("noise-prediction SNR", len(batches)) as task:
        for indices in batches:
            inputs = held_out.inputs(indices, prompts)
            expected = original(inputs).flatten(1).double()
            # A large original leaves the memory while the other model runs.
            release_mapped_weights()
            difference = expected - quantized(inputs).flatten(1).double()
            signal[indices] = expected.square().sum(dim=1).cpu()
            noise[indices] = difference.square().sum(dim=1).cpu()
            task.advance()
    conditional = held_out.prompt_index >= 0
    steps = []
    for step in sorted(set(held_out.step_index.tolist())):
        here = held_out.step_index == step
        figures = [_pooled_db(signal, noise, mask) for mask in (here, here & conditional, here & ~conditional)]
        steps.append(StepSnr(step, float(held_out.timesteps[here][0]), *figures))
    return NoiseSnr(tuple(steps))


def _pooled_db(signal: Tensor, noise: Tensor, mask: Tensor) -> float:
    if not bool(mask.any()):
        return float("nan")
    return bounded_db(power_ratio_db(float(signal[mask].sum()), float(noise[mask].sum())))


@dataclass(frozen=True)
class LayerQuality:
    """What quantization costs one layer: SQNR in dB of its weight, and of its output on the original model's inputs
    with weight and input quantized, a wide layer's by a sample of its output channels. `product` says what its
    container makes of it, None for block scaling."""

    name: str
    shape: tuple[int, int]
    weight_format: str
    activation_format: str
    group_size: int
    scales: str
    container: str
    weight_sqnr_db: float
    output_sqnr_db: float
    product: ContainerProduct | None


@contextmanager
def collected_rows(original: nn.Module, plan: Plan, batches: int) -> Iterator[dict[str, Tensor]]:
    """Collect token rows [R, K] that reach every planned layer while the original model runs on so many batches."""
    width = sum(layer.in_features for layer in plan.layers)
    most = min(_LAYER_ROWS, max(_FEWEST_ROWS, _MOST_NUMBERS // max(width, 1)))
    per_batch = max(1, most // batches)
    rows: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for layer in plan.layers:

            def keep(_module: nn.Module, args: tuple[Any, ...], name: str = layer.name) -> None:
                flat = args[0].reshape(-1, args[0].shape[-1])
                chosen = torch.linspace(0, len(flat) - 1, min(per_batch, len(flat))).round().long()
                rows[name] = torch.cat([rows.get(name, flat[:0]), flat[chosen]])

            hooks.callback(planned_linear(original, layer).register_forward_pre_hook(keep).remove)
        yield rows


def layer_quality(
    original: nn.Module, quantized: nn.Module, plan: Plan, rows: Mapping[str, Tensor]
) -> tuple[LayerQuality, ...]:
    """Measure every planned layer on `rows` [R, K] of its inputs in the original model."""

    def measured(layer: LayerPlan) -> LayerQuality:
        rounded = cast(QuantLinear, quantized.get_submodule(layer.name))
        return _measured_layer(layer, planned_linear(original, layer), rounded, rows[layer.name])

    layers: list[LayerQuality] = []
    for start in range(0, len(plan.layers), _LAYERS_AT_ONCE):
        release_mapped_weights()
        layers += on_every_core(measured, plan.layers[start : start + _LAYERS_AT_ONCE])
    return tuple(layers)


def _measured_layer(layer: LayerPlan, linear: nn.Linear, rounded: QuantLinear, x: Tensor) -> LayerQuality:
    channels = slice(None, None, max(1, layer.out_features // _LAYER_CHANNELS))
    exact, bias = linear.weight[channels], None if linear.bias is None else linear.bias[channels]
    fmt = get_format(layer.weight_format)
    weight = unpacked_weight(rounded.words[channels], rounded.scales[channels], fmt, layer.in_features)
    quantized_input = rounded.quantize_input(x)
    entering = x if quantized_input is None else dequantize(*quantized_input)
    return LayerQuality(
        name=layer.name,
        shape=(layer.out_features, layer.in_features),
        weight_format=layer.weight_format,
        activation_format=layer.activation_format,
        group_size=layer.group_size,
        scales=layer.scales,
        container=layer.container,
        weight_sqnr_db=_sqnr(exact, weight),
        output_sqnr_db=_sqnr(F.linear(x, exact, bias), F.linear(entering, weight, bias)),
        product=layer.product,
    )


def _sqnr(exact: Tensor, rounded: Tensor) -> float:
    """`snr_db` of tensors; a difference in float32 is exact enough for what quantization leaves."""
    signal, noise = (
        float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in (exact, exact - rounded)
    )
    return bounded_db(power_ratio_db(signal, noise))


def class_accuracy(samples: Tensor, labels: Tensor, classifier: Path, *, batch_size: int = 256) -> float:
    """Fraction of `samples` [n, C, H, W] whose largest logit is that of `labels` int64 [n], by an ONNX classifier.

    Raises:
        InputError: the classifier cannot be loaded, or does not take the samples, or gives no logits [n, classes].
    """
    session = OnnxSession(classifier)
    correct = 0
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size].numpy(force=True).astype(np.float32)
        result = session.run({session.inputs[0].name: batch}, [session.outputs[0].name])
        (logits,) = result.values()
        correct += _hits(logits, labels[start : start + batch_size].numpy(force=True), classifier)
    return correct / len(samples)


def _hits(logits: npt.NDArray[Any], labels: npt.NDArray[np.int64], classifier: Path) -> int:
    if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] <= int(labels.max()):
        raise InputError(
            f"{classifier}: gives {list(logits.shape)} for {len(labels)} samples labelled up to {int(labels.max())}; "
            "expected logits [samples, classes]"
        )
    return int((logits.argmax(axis=1) == labels).sum())
