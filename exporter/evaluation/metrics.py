"""The metrics, each through its own package; one that cannot be computed here says why, and never gives a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from exporter.errors import Fp4ExportError, InputError, did_you_mean
from exporter.evaluation.presets import FidMode
from exporter.evaluation.scorers import preference_scores
from exporter.models.location import fetch_snapshot
from exporter.progress import Progress, Task

CLIP_MODEL = "openai/clip-vit-large-patch14"
_CLIP_FILES = ("*.json", "*.txt", "model*.safetensors")
_FID_BATCH = 32


class NotComputedError(Fp4ExportError):
    """A metric that lacks a package, weights or images; the message says what to do."""


@dataclass(frozen=True)
class Pictures:
    """Images of one model in a folder of their own, in the order of `texts` (None without texts).

    `originals` are the original model's images of the same prompts, None when these are the original's; `references` is
    a folder of real images.
    """

    folder: Path
    names: tuple[str, ...]
    texts: tuple[str, ...] | None
    originals: Path | None
    references: Path | None


@dataclass(frozen=True)
class Tools:
    """What metrics are computed with: a device, CLIP's weights (Hub id or folder), interpreters by metric name."""

    device: str
    fid_mode: FidMode = "clean"
    clip_model: str = CLIP_MODEL
    pythons: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Measured:
    """A metric's value with the package that computed it, or None and the reason."""

    value: float | None
    package: str = ""
    not_computed: str = ""


@dataclass(frozen=True)
class Metric:
    """`package` is the distribution that computes it and `install` the command that installs it.

    `paired` ones compare images with the original's.
    """

    name: str
    label: str
    better: Literal["higher", "lower"]
    package: str
    install: str
    compute: Callable[[Pictures, Tools, Task], float]
    paired: bool = False


def measure(metric: Metric, pictures: Pictures, tools: Tools, progress: Progress) -> Measured:
    """Compute a metric, or say why not."""
    try:
        with progress.task(f"{metric.label} of {pictures.folder.name}", len(pictures.names)) as task:
            value = metric.compute(pictures, tools, task)
    except NotComputedError as error:
        return Measured(None, not_computed=str(error))
    except ImportError as error:
        return Measured(None, not_computed=f"{_first_line(error)}; {metric.install}")
    except (OSError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        # Weights that cannot be downloaded, and packages that do not fit each other or this PyTorch.
        return Measured(None, not_computed=f"{metric.package} failed: {_first_line(error)}")
    if not math.isfinite(value):
        return Measured(None, not_computed=f"it is {value}: some images are the same, or hold no numbers")
    return Measured(value, _version(metric.package))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def _psnr(pictures: Pictures, tools: Tools, task: Task) -> float:
    from torchmetrics.image import PeakSignalNoiseRatio

    # The mean of the images' PSNR, as deepcompressor takes it.
    metric = PeakSignalNoiseRatio(data_range=(0.0, 1.0), reduction="elementwise_mean", dim=(1, 2, 3))
    return _over_pairs(metric, pictures, tools, task)


def _ssim(pictures: Pictures, tools: Tools, task: Task) -> float:
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    return _over_pairs(StructuralSimilarityIndexMeasure(data_range=(0.0, 1.0)), pictures, tools, task)


def _lpips(pictures: Pictures, tools: Tools, task: Task) -> float:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return _over_pairs(LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True), pictures, tools, task)


def _over_pairs(metric: Any, pictures: Pictures, tools: Tools, task: Task) -> float:
    """A torchmetrics metric of every image against the original's of the same name."""
    originals = pictures.originals
    if originals is None:
        raise NotComputedError("it compares with the original's images")
    metric = metric.to(tools.device)
    for name in pictures.names:
        ours, original = (_pixels(folder / name, tools.device) / 255 for folder in (pictures.folder, originals))
        metric.update(ours[None], original[None])
        task.advance()
    return float(metric.compute())


def _pixels(path: Path, device: str) -> Tensor:
    """A PNG as float32 [3, H, W] from 0 to 255."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().to(device)


def _clip_score(pictures: Pictures, tools: Tools, task: Task) -> float:
    """100 x the mean cosine of image and text, at least 0. torchmetrics 1.9 knows no folder and no transformers 5."""
    texts = _texts(pictures)
    model, processor = _load_clip(tools.clip_model)
    model = model.to(tools.device)
    cosines = 0.0
    for name, text in zip(pictures.names, texts, strict=True):
        with Image.open(pictures.folder / name) as image, torch.no_grad():
            inputs = processor(
                text=[text], images=[image.convert("RGB")], return_tensors="pt", padding=True, truncation=True
            )
            outputs = model(**inputs.to(tools.device))
        cosines += float((outputs.image_embeds * outputs.text_embeds).sum())
        task.advance()
    return max(0.0, 100 * cosines / len(texts))


def _load_clip(given: str) -> tuple[Any, Any]:
    """CLIP and its processor from a folder or a Hub id, which is looked up once, not file by file with many tries."""
    from transformers import CLIPModel, CLIPProcessor

    folder = Path(given)
    if not folder.is_dir():
        advice = "download it where there is a network and give the folder: --clip-model DIR"
        try:
            folder = fetch_snapshot("CLIP", given, _CLIP_FILES, advice)
        except Fp4ExportError as error:
            raise NotComputedError(str(error)) from error
    return CLIPModel.from_pretrained(folder, use_safetensors=True), CLIPProcessor.from_pretrained(folder)


def _texts(pictures: Pictures) -> tuple[str, ...]:
    if pictures.texts is None:
        raise NotComputedError("the prompt list has no texts; give the list as text with --prompts, and --embeddings")
    return pictures.texts


def _fid(pictures: Pictures, tools: Tools, task: Task) -> float:
    if pictures.references is None:
        raise NotComputedError("it needs real images: --reference-images DIR")
    from cleanfid import fid

    score = fid.compute_fid(
        str(pictures.references),
        str(pictures.folder),
        mode=tools.fid_mode,
        batch_size=_FID_BATCH,
        num_workers=0,
        device=torch.device(tools.device),
        use_dataparallel=False,
        verbose=False,
    )
    task.advance(len(pictures.names))
    return float(score)


def _preference(worker: str) -> Callable[[Pictures, Tools, Task], float]:
    """A metric that a process of its own computes, in the interpreter that the user names for it."""

    def compute(pictures: Pictures, tools: Tools, task: Task) -> float:
        texts = _texts(pictures)
        python = (tools.pythons or {}).get(worker)
        files = [pictures.folder / name for name in pictures.names]
        scores = preference_scores(worker, python, files, texts, task)
        return sum(scores) / len(scores)

    return compute


_EXTRA = "pip install 'fp4export[metrics]'"
_OWN_ENVIRONMENT = "python -m venv DIR && DIR/bin/pip install {package}, then --python {name}=DIR/bin/python"


def _in_own_environment(name: str, package: str) -> str:
    return _OWN_ENVIRONMENT.format(name=name, package=package)


METRICS = (
    Metric("fid", "FID", "lower", "clean-fid", _EXTRA, _fid),
    Metric("clip_score", "CLIP score", "higher", "transformers", _EXTRA, _clip_score),
    Metric("lpips", "LPIPS", "lower", "torchmetrics", _EXTRA, _lpips, paired=True),
    Metric("psnr", "PSNR", "higher", "torchmetrics", _EXTRA, _psnr, paired=True),
    Metric("ssim", "SSIM", "higher", "torchmetrics", _EXTRA, _ssim, paired=True),
    Metric("hpsv2", "HPSv2", "higher", "hpsv2", _in_own_environment("hpsv2", "hpsv2"), _preference("hpsv2")),
    Metric(
        "image_reward",
        "ImageReward",
        "higher",
        "image-reward",
        _in_own_environment("image_reward", "image-reward"),
        _preference("image_reward"),
    ),
)


def metrics_named(names: Sequence[str] | None) -> tuple[Metric, ...]:
    """The metrics of these names, all without names. Raises `InputError` for an unknown one."""
    known = {metric.name: metric for metric in METRICS}
    for name in names or ():
        if name not in known:
            raise InputError(f"unknown metric {name!r}{did_you_mean(name, known)}")
    return METRICS if names is None else tuple(known[name] for name in names)
