"""Calibrate and measure one cell; everything that takes long is kept, so that an interrupted run goes on.

A measured cell is a small file that is committed, with the program and PyTorch that measured it, so that rows add up
over machines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from exporter import load_recipe
from exporter.calibration.placement import Placement
from exporter.calibration_stages import capture
from exporter.evaluate import prompt_order
from exporter.files import sha256_of, write_text_atomically
from exporter.job import Job, open_job
from exporter.progress import NullProgress, Progress
from exporter.quality import noise_prediction_snr
from exporter.sampling import MOST_SAMPLES, Denoiser, make_scheduler, sample
from exporter.source import Source, load_source
from exporter.stage_files import captured_file
from exporter.tensor_files import atomic_tensor_path
from exporter.workdir import program_identity
from tools.quality_cells.figures import (
    RESAMPLES,
    Comparison,
    Interval,
    Judge,
    bootstrapped,
    decibels_closer,
    distances_apart,
    frechet_distance,
    signal_to_noise_db,
)
from tools.quality_cells.quantized import Quantized, quantized
from tools.quality_cells.rows import HELD_OUT_SEED, SEEDS, Bits, Row

_HELD_OUT_TRAJECTORIES = 16
_DRIFT_SAMPLES = 64
# Divides 2,000, so that nothing is compiled for a last, smaller batch.
_COMPILED_BATCH = 40
_PROGRAM_DIGITS = 12
_DRAWN = "drawn"


@dataclass(frozen=True)
class Figures:
    """A cell: noise predictions on held-out trajectories, drift of finished samples, CPU seconds of calibrating, and
    the `program`, a hash of the exporter's source and libraries, and version of PyTorch that measured these; on
    `samples` samples (0: not measured) what the classifier recognises and the Fréchet distance to the original's, and
    what has `drawn` them: PyTorch's version and the GPU, if it was one."""

    snr_mean_db: float
    snr_worst_db: float
    drift_db: float
    calibration_seconds: float
    program: str
    torch: str
    samples: int = 0
    recognised: Interval | None = None
    frechet: Interval | None = None
    drawn: str = ""


@dataclass(frozen=True)
class Laboratory:
    """A recipe to change, a folder for everything that can be made again, and one for the measured cells; where samples
    to judge are drawn."""

    recipe: Path
    folder: Path
    cells: Path
    progress: Progress
    placement: Placement = field(default_factory=Placement)

    def job(self, changes: Sequence[str], name: str) -> Job:
        """The changed recipe's job in the work folder `name`, which captures and calibrates on the CPU."""
        recipe = load_recipe(self.recipe, (*changes, "calibration.device=cpu"), "cpu")
        work = self.folder / f"{name}.work"
        output = self.folder / "not_written.onnx"
        return open_job(recipe, output, work, fresh=False, keep_graphs=False, progress=NullProgress())

    def cell(self, row: Row, bits: Bits, seed: int, samples: int) -> Figures:
        """The figures of a cell, measured as far as they are not kept."""
        kept = self.kept(row, bits, seed)
        if kept is None:
            with self.progress.task(f"{bits.name} {row.key} seed {seed}", 1):
                kept = self._measured(self._quantized(row, bits, seed))
            self._keep(row, bits, seed, kept)
        if samples > kept.samples:
            with self.progress.task(f"{bits.name} {row.key} seed {seed}: {samples} samples", 1):
                images, drawn = self.cell_samples(row, bits, seed, samples)
                recognised, frechet = self._judged(images, RESAMPLES if seed == SEEDS[0] else 0)
                kept = replace(kept, samples=samples, recognised=recognised, frechet=frechet, drawn=drawn)
            self._keep(row, bits, seed, kept)
        return kept

    def kept(self, row: Row, bits: Bits, seed: int) -> Figures | None:
        """What an earlier run measured, if it was the same model and settings, or the model is not here."""
        file = self._file(row, bits, seed)
        if not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        settings = found.pop("settings")
        if self.recipe.is_file() and settings != self._settings(row, bits, seed):
            return None
        for name in ("recognised", "frechet"):
            found[name] = None if found[name] is None else Interval(**found[name])
        return Figures(**found)

    def all_kept(self, row: Row, bits: Bits) -> list[Figures]:
        """`kept` of the seeds that have been measured."""
        return [figures for seed in SEEDS if (figures := self.kept(row, bits, seed)) is not None]

    def _keep(self, row: Row, bits: Bits, seed: int, figures: Figures) -> None:
        file = self._file(row, bits, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {"settings": self._settings(row, bits, seed), **asdict(figures)}
        write_text_atomically(file, json.dumps(kept, indent=1) + "\n")

    def _file(self, row: Row, bits: Bits, seed: int) -> Path:
        return self.cells / f"{bits.name}.{row.key}.{seed}.json"

    def _settings(self, row: Row, bits: Bits, seed: int) -> str:
        """A hash of the model's and prompts' files and of all that the recipe sets, evaluation aside."""
        recipe = load_recipe(self.recipe, (*row.changes(bits), f"calibration.seed={seed}"), "cpu")
        settings = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"evaluation"})
        text = json.dumps([settings, self._files, *row.loop_settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def _files(self) -> list[str]:
        recipe = load_recipe(self.recipe, (), "cpu")
        assert recipe.calibration.prompts is not None
        files = sorted(recipe.resolve_path(recipe.model.weights).rglob("*.safetensors"))
        return [sha256_of(file) for file in (*files, recipe.resolve_path(recipe.calibration.prompts))]

    def _quantized(self, row: Row, bits: Bits, seed: int) -> Quantized:
        job = self.job((*row.changes(bits), f"calibration.seed={seed}"), f"seed{seed}")
        return quantized(job, row, self.folder / "weights")

    def _measured(self, model: Quantized) -> Figures:
        _, original = self._original
        changes = f"calibration.samples={_HELD_OUT_TRAJECTORIES}", f"calibration.seed={HELD_OUT_SEED}"
        job = self.job(changes, "original")
        held_out = capture(job, original, captured_file(job, original))
        noise = noise_prediction_snr(original.denoiser, model.denoiser, held_out, original.prompts, NullProgress())
        exact = self.original_samples("drift", _DRIFT_SAMPLES, HELD_OUT_SEED)
        drift = signal_to_noise_db(exact, self._samples(model.denoiser, _DRIFT_SAMPLES, HELD_OUT_SEED))
        program = program_identity()[:_PROGRAM_DIGITS]
        return Figures(noise.mean_db, noise.worst_db, drift, model.seconds, program, torch.__version__)

    def original_judged(self, samples: int) -> tuple[Interval, Interval] | None:
        """What the classifier says of the original's samples: no quantized model can do better. 0 samples, and none
        kept: None."""
        file = self.cells / "original.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if samples and (found is None or found["samples"] < samples):
            recognised, frechet = self._judged(self.original_samples("same", samples, HELD_OUT_SEED), RESAMPLES)
            found = {"samples": samples, "recognised": asdict(recognised), "frechet": asdict(frechet)}
            write_text_atomically(file, json.dumps(found, indent=1) + "\n")
        return None if found is None else (Interval(**found["recognised"]), Interval(**found["frechet"]))

    def _judged(self, images: npt.NDArray[np.float32], resamples: int) -> tuple[Interval, Interval]:
        """Share recognised of samples, and their distance to as many of the original from other seeds."""
        _, original = self._original
        assert original.prompts.labels is not None
        judge = self._judge
        reference = self.original_samples("reference", len(images), HELD_OUT_SEED + len(images))
        classes, ours = judge.look(images)
        _, theirs = judge.look(reference)
        right = classes == original.prompts.labels[prompt_order(original, len(images))].numpy()
        share = bootstrapped(lambda chosen: float(right[chosen].mean()), len(images), resamples=resamples)
        distance = bootstrapped(
            lambda chosen, other: frechet_distance(ours[chosen], theirs[other]),
            len(images),
            sets=2,
            resamples=resamples,
        )
        return share.within(0.0, 1.0), distance

    def cell_samples(self, row: Row, bits: Bits, seed: int, count: int) -> tuple[npt.NDArray[np.float32], str]:
        """Samples of a cell's model, kept, and what drew them."""
        name = f"{bits.name}.{row.key}.{seed}.{self._settings(row, bits, seed)}.{count}.safetensors"

        def draw() -> npt.NDArray[np.float32]:
            model = self._quantized(row, bits, seed)
            if not self.placement.on_gpu:
                return self._samples(model.compiled(), count, HELD_OUT_SEED, batch_size=_COMPILED_BATCH)
            with self.placement.computing():
                # All at once: a GPU would take as long for a hundredth of them.
                return self._samples(model.denoiser_on(self.placement.device), count, HELD_OUT_SEED, batch_size=count)

        where = f" on {torch.cuda.get_device_name(self.placement.device)}" if self.placement.on_gpu else ", compiled"
        drawn = f"PyTorch {torch.__version__}{where}"
        return _kept_samples(self.folder / "samples" / name, draw, drawn)

    def compared(self, row: Row, others: Sequence[Row], bits: Bits, seed: int, samples: int) -> Comparison:
        """`row` against `others` on `samples` samples of the same noise, kept. With 0 samples only what is kept."""
        file = self.cells / f"compared.{bits.name}.{row.key}.{seed}.json"
        if not samples:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"frechet": {}, "features": {}}
            return Comparison(
                **{
                    name: {key: Interval(**interval) for key, interval in intervals.items()}
                    for name, intervals in found.items()
                }
            )
        look = self._judge.look
        features = {one.key: look(self.cell_samples(one, bits, seed, samples)[0])[1] for one in (row, *others)}
        ours = features.pop(row.key)
        _, theirs = look(self.original_samples("reference", samples, HELD_OUT_SEED + samples))
        _, exact = look(self.original_samples("same", samples, HELD_OUT_SEED))
        made = Comparison(distances_apart(ours, features, theirs), decibels_closer(ours, features, exact))
        write_text_atomically(file, json.dumps(asdict(made), indent=1) + "\n")
        return made

    def original_samples(self, name: str, count: int, seed: int) -> npt.NDArray[np.float32]:
        """Samples of the original model, kept."""
        file = self.folder / f"original.{name}.{count}.safetensors"
        images, _ = _kept_samples(file, lambda: self._samples(self._original[1].denoiser, count, seed), "")
        return images

    @cached_property
    def _judge(self) -> Judge:
        recipe = load_recipe(self.recipe, (), "cpu")
        assert recipe.evaluation.classifier is not None
        return Judge(recipe.resolve_path(recipe.evaluation.classifier))

    @cached_property
    def _original(self) -> tuple[Job, Source]:
        job = self.job((), "original")
        return job, load_source(job)

    def _samples(
        self, denoiser: Denoiser, count: int, seed: int, batch_size: int = MOST_SAMPLES
    ) -> npt.NDArray[np.float32]:
        """Guided samples float32 [count, C, H, W], prompts in turn."""
        job, original = self._original
        settings = job.recipe.calibration
        noise = original.adapter.training_noise
        return sample(
            denoiser,
            original.prompts,
            prompt_order(original, count),
            make_scheduler(settings.scheduler, original.files.scheduler, settings.steps, noise),
            steps=settings.steps,
            guidance=settings.guidance,
            seed=seed,
            latent_shape=original.latent_shape,
            batch_size=batch_size,
        ).numpy()


def digits_laboratory(progress: Progress) -> Laboratory:
    """That of the digits recipe, on the CPU, beside whose cells other tools measure."""
    root = Path(__file__).parents[2]
    folder = root / "build" / "quality" / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    return Laboratory(root / "recipes" / "digits.yaml", folder, root / "docs" / "quality" / "digits", progress)


def _kept_samples(
    file: Path, draw: Callable[[], npt.NDArray[np.float32]], drawn: str
) -> tuple[npt.NDArray[np.float32], str]:
    """What `draw` gave when the file was made, and what `drawn` was then."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_tensor_path(file) as unfinished:
            save_file({"samples": torch.from_numpy(draw())}, unfinished, {_DRAWN: drawn})
    with safe_open(file, "np") as found:
        images: npt.NDArray[np.float32] = found.get_tensor("samples")
        return images, (found.metadata() or {}).get(_DRAWN, "")
