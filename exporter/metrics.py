"""NAME.metrics.json: the figures of one export, checked against the schema that ships beside this file."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jsonschema

from exporter.compute import Compute
from exporter.errors import InputError
from exporter.files import write_text_atomically
from exporter.gate.table import GateResult, bounded_db
from exporter.plan import LayerPlan
from exporter.scale_comparison import ScaleSummary
from exporter.targets import Kernels

_PACKAGES = (
    "fp4export",
    "torch",
    "diffusers",
    "onnx",
    "onnxruntime",
    "onnx-graphsurgeon",
    "polygraphy",
    "numpy",
    "tensorrt-rtx",
    "tensorrt",
)


@dataclass(frozen=True)
class Size:
    """Bytes of the original's parameters in FP32, and of the output file."""

    fp32_bytes: int
    output_bytes: int

    @property
    def ratio(self) -> float:
        """Output over original."""
        return self.output_bytes / self.fp32_bytes


@dataclass(frozen=True)
class Fidelity:
    """How closely the graphs follow the torch fake-quant model; SNR in dB, at most 200 (no deviation)."""

    passed: bool
    linear_min_snr_db: float
    block_min_snr_db: float
    code_mismatch_fraction: float
    end_to_end_snr_db: float
    quantization_snr_db: float

    @classmethod
    def of(cls, result: GateResult, quantization_db: float) -> Fidelity:
        """The worst rows of a gate's result, and the quantization error that they are judged against."""

        def worst(*kinds: Any) -> float:
            snr_db = result.worst_snr_db(*kinds)
            return bounded_db(float("nan") if snr_db is None else snr_db)

        return cls(
            passed=result.passed,
            linear_min_snr_db=worst("linear"),
            block_min_snr_db=worst("block", "stem", "tail"),
            code_mismatch_fraction=result.code_mismatch_fraction,
            end_to_end_snr_db=worst("end_to_end"),
            quantization_snr_db=bounded_db(quantization_db),
        )


@dataclass(frozen=True)
class Quality:
    """How far quantization moves the model: noise-prediction SNR in dB over held-out trajectories, and the fraction
    of samples that the classifier recognises (None without a classifier)."""

    eps_snr_db_mean: float
    eps_snr_db_worst_step: float
    class_accuracy_fp: float | None = None
    class_accuracy_quantized: float | None = None


@dataclass(frozen=True)
class LayerContainer:
    """What a layer's container makes of it; the bound is None where sums are no integers, and everything but the name
    for block scaling, whose scales are inside the sums."""

    layer: str
    container: str
    exact: bool | None
    accumulator_bound: int | None
    accumulator_limit: int | None
    reason: str | None

    @classmethod
    def of(cls, layer: LayerPlan) -> LayerContainer:
        """As planned."""
        product = layer.product
        if product is None:
            return cls(layer.name, layer.container, None, None, None, None)
        return cls(
            layer=layer.name,
            container=layer.container,
            exact=product.exact,
            accumulator_bound=product.accumulator_bound,
            accumulator_limit=product.container.accumulator_limit,
            reason=product.reason,
        )


@dataclass(frozen=True)
class LayerFormat:
    """How the weight format of a layer with `weight: auto` was chosen: the SNR in dB of its block's output with every
    candidate, and the formats that the target refused, with the reason."""

    layer: str
    chosen: str
    snr_db: Mapping[str, float]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class ComputeFigures:
    """What the engine computes in outside its quantized linears, and for FP16 the largest number it met there on the
    calibration inputs, with its place in the graph."""

    type: Compute = "fp32"
    largest_amax: float | None = None
    largest_amax_at: str | None = None


@dataclass(frozen=True)
class Metrics:
    """One export's figures; `fidelity` is None without validation, `quality` None without evaluation.

    `kernels` says whose multiply: ONNX Runtime's or TensorRT's own ("native"), or plugins.
    """

    target: str
    size: Size
    fidelity: Fidelity | None
    quality: Quality | None
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    layers: tuple[LayerContainer, ...] = ()
    scales: tuple[ScaleSummary, ...] = ()
    compute: ComputeFigures = ComputeFigures()
    kernels: Kernels = "native"
    formats: tuple[LayerFormat, ...] = ()

    def to_json(self) -> str:
        """The document as indented JSON. Raises `jsonschema.ValidationError` if it breaks the schema."""
        document = {
            "target": self.target,
            "compute": asdict(self.compute),
            "kernels": self.kernels,
            "size": asdict(self.size),
            "fidelity": None if self.fidelity is None else asdict(self.fidelity),
            "quality": None if self.quality is None else asdict(self.quality),
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            "versions": dict(self.versions),
            "layers": [asdict(layer) for layer in self.layers],
            "scales": [asdict(kind) for kind in self.scales],
            "formats": [asdict(layer) for layer in self.formats],
        }
        check_metrics(document)
        return json.dumps(document, indent=1, allow_nan=False) + "\n"


def metrics_schema() -> dict[str, Any]:
    """The JSON schema of a metrics file."""
    text = resources.files("exporter").joinpath("metrics.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def check_metrics(document: Mapping[str, Any]) -> None:
    """Raise `jsonschema.ValidationError` unless `document` is a valid metrics file's content."""
    jsonschema.validate(document, metrics_schema(), cls=jsonschema.Draft202012Validator)


def write_metrics(path: Path, metrics: Metrics) -> None:
    """Write NAME.metrics.json whole or not at all. Raises `jsonschema.ValidationError` for impossible figures."""
    write_text_atomically(path, metrics.to_json())


def read_metrics(path: Path) -> dict[str, Any]:
    """Read and check a metrics file.

    Raises:
        InputError: it is missing, no JSON, or breaks the schema.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_metrics(document)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except jsonschema.ValidationError as error:
        place = "/".join(str(part) for part in error.absolute_path) or "the document"
        raise InputError(f"{path}: {place}: {error.message}") from error
    return document


def installed_versions() -> dict[str, str]:
    """Python's version and those of the packages that decide what is written."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
