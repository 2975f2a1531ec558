"""The shipped digits model: fp4export's rows against ONNX Runtime's own INT8, on the same held-out trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter import export, load_recipe
from exporter.evaluate import graph_denoiser, held_out_inputs
from exporter.job import open_job
from exporter.progress import Progress
from exporter.quality import NoiseSnr, noise_prediction_snr
from exporter.runtime import OnnxSession
from exporter.source import load_source
from tools.cpu_bench.graphs import DYNAMIC, export_float, quantize_dynamically

RECIPE = Path(__file__).parents[2] / "recipes" / "digits.yaml"


@dataclass(frozen=True)
class Row:
    """Noise-prediction SNR against the FP32 model, in decibels."""

    name: str
    mean_db: float
    worst_db: float


_ADAROUND = ("method.balance=false", "method.start=nearest", "method.learning_rate=0.03")
ROWS = (
    ("W4A6 (E2M1 × E2M3), AdaRound", _ADAROUND),
    ("W4A8 (E2M1 × INT8), AdaRound", ("layers=[{match: 'transformer_blocks.*', activation: int8}]", *_ADAROUND)),
)


def measure_digits(folder: Path, progress: Progress) -> list[Row]:
    """Export every row as a user would, and quantize the FP32 graph dynamically; finished stages are reused."""
    rows = [_row(DYNAMIC, _dynamic(folder, progress))]
    for index, (name, changes) in enumerate(ROWS):
        settings = ("evaluation.samples=20", *changes)
        result = export(load_recipe(RECIPE, settings), folder / f"digits{index}.onnx", progress=progress)
        rows.append(_row(name, result.evaluation.noise))
    return rows


def _row(name: str, noise: NoiseSnr) -> Row:
    return Row(name, noise.mean_db, noise.worst_db)


def _dynamic(folder: Path, progress: Progress) -> NoiseSnr:
    job = open_job(
        load_recipe(RECIPE), folder / "dynamic.onnx", None, fresh=False, keep_graphs=False, progress=progress
    )
    source = load_source(job)
    held_out = held_out_inputs(job, source)
    plain, quantized = folder / "digits.fp32.onnx", folder / "digits.int8.onnx"
    export_float(source.model, plain, tokens=source.prompts.positive["encoder_hidden_states"].shape[1])
    quantize_dynamically(plain, quantized)
    session = OnnxSession(quantized)
    engine = graph_denoiser(source, lambda: session)
    return noise_prediction_snr(source.denoiser, engine, held_out, source.prompts, progress)
