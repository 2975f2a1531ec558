"""The model of one cell: calibrated once, its weights kept for all cells that share them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration_stages import captured_inputs, formats_chosen, sample_weights
from exporter.files import write_text_atomically
from exporter.job import Job
from exporter.model_stages import balanced, transformed
from exporter.models.adapter import Adapter
from exporter.models.inputs import TransformerInputs
from exporter.progress import NullProgress
from exporter.quantize import load_quantized, quantize_model, save_quantized
from exporter.sampling import Denoiser
from exporter.source import Source, load_source
from exporter.tensor_files import atomic_tensor_path
from exporter.workdir import name_for
from tools.quality_cells.layers import rounded_weights, with_decoded_weights, with_quantized_inputs, with_zero_points
from tools.quality_cells.published_loop import calibrate_as_published
from tools.quality_cells.rows import BATCH, Row


@dataclass(frozen=True)
class Quantized:
    """A fake-quantized model with its family's adapter, and the CPU seconds that calibrating took; those of capturing
    inputs and of balancing them are not in it."""

    model: nn.Module
    adapter: Adapter
    seconds: float

    @property
    def denoiser(self) -> Denoiser:
        """Its noise prediction."""
        return partial(self.adapter.predict_noise, self.model)

    def denoiser_on(self, device: torch.device) -> Denoiser:
        """The same, computed on a device, with results in main memory."""
        model = with_decoded_weights(self.model).to(device)

        @torch.no_grad()
        def predict(inputs: TransformerInputs) -> Tensor:
            return self.adapter.predict_noise(model, inputs.to(device)).cpu()

        return predict

    def compiled(self) -> Denoiser:
        """The same, compiled by torch.compile: on a CPU a third faster."""
        model, is_compiled = with_decoded_weights(self.model), False

        @torch.no_grad()
        def predict(inputs: TransformerInputs) -> Tensor:
            nonlocal is_compiled
            noise = self.adapter.predict_noise(model, inputs)
            if not is_compiled:
                # After one call: the formats' tables are made on first use, of numpy arrays, which Dynamo cannot trace.
                model.compile(dynamic=False)
                is_compiled = True
            return noise

        return predict


def quantized(job: Job, row: Row, weights: Path) -> Quantized:
    """The row's model by the job's recipe; calibrated weights are kept in the folder `weights`."""
    source = load_source(job)
    captured = captured_inputs(job, source)
    make = _by_published_loop if row.published_loop else _by_recipe
    return make(job, source, captured, row, weights)


def _by_recipe(job: Job, source: Source, captured: CalibrationSet, row: Row, weights: Path) -> Quantized:
    source = transformed(job, balanced(job, source, captured))
    begin = time.process_time()
    source = formats_chosen(job, source, captured)
    method, seed = job.recipe.method, job.recipe.calibration.seed
    facts = source.layer_facts()
    if not method.quantize_activations:
        # Rounding does not see how activations are quantized, so that columns share it.
        facts = [{**layer, "activation_format": ""} for layer in facts]
    file = weights / name_for(str(seed), ".safetensors", [source.identity, facts, method.model_dump()])

    def make() -> None:
        run = source.calibration_run(captured, sample_weights(job, source, captured))
        save_quantized(file, calibrate(source.model, source.plan, run, method, seed, NullProgress()), source.plan)

    seconds = _seconds_of(make, file, begin)
    model: nn.Module = quantize_model(source.model, source.plan, load_quantized(file, source.plan).weights)
    if row.zero_points:
        model = with_zero_points(model)
    return Quantized(model, source.adapter, seconds)


def _by_published_loop(job: Job, source: Source, captured: CalibrationSet, row: Row, weights: Path) -> Quantized:
    seed, captured_settings = job.recipe.calibration.seed, job.recipe.calibration.captured
    file = weights / name_for(f"loop.{seed}", ".safetensors", [source.identity, row.loop_settings, captured_settings])

    def make() -> None:
        run = source.calibration_run(captured)
        made = calibrate_as_published(source.model, run, row.published_loop, BATCH, seed, lambda: None)
        with atomic_tensor_path(file) as unfinished:
            save_file(rounded_weights(made), unfinished)

    seconds = _seconds_of(make, file, time.process_time())
    model = with_quantized_inputs(source.model, load_file(file), source.plan.layers[0].activation_format)
    return Quantized(model, source.adapter, seconds)


def _seconds_of(make: Callable[[], None], file: Path, begin: float) -> float:
    """Let `make` write the weights' `file`, unless it is kept; the CPU seconds that this took, counted from `begin`."""
    seconds = file.with_suffix(".seconds")
    if not seconds.is_file():
        file.parent.mkdir(exist_ok=True)
        make()
        write_text_atomically(seconds, f"{time.process_time() - begin:.1f}\n")
    return float(seconds.read_text(encoding="utf-8"))
