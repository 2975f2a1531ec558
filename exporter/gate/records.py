"""What the torch model computed: the gate's inputs and expected outputs, saved so that a check can be repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file

from exporter.compute import COMPUTE_TYPES, Compute
from exporter.errors import InputError
from exporter.files import write_text_atomically
from exporter.gate.table import Stage
from exporter.tensor_files import atomic_tensor_path

Floats: TypeAlias = npt.NDArray[np.float32]

OUTPUT = "sample"
"""The model's output, in graphs and in records."""
SHARED_PREFIX = "blocks."
"""Begins the names of what all blocks read."""

MANIFEST = "manifest.json"
TENSORS = "reference.safetensors"
_VERSION = 5
# Where the compute type, not quantization, limits the agreement: its rounding, at least so far away, is asked for.
ROUNDING_MARGIN_DB = 6.0
_FACTS = ("layer", "weight_format", "activation_format", "rank", "probes", "products")
_ARRAYS = ("x", "values", "scales", "y", "bias", "noise_floor")
_OUTPUT_FACTS = ("layer", "format", "rank")
_OUTPUT_ARRAYS = ("x", "values", "scales")


@dataclass(frozen=True)
class LinearRecord:
    """One quantized linear on R token rows, the last `probes` of which are synthetic.

    x [R, K]; values [R, K] and scales [R, 1] (or [R, G] in blocks) of the quantized input, None for a weight-only
    layer; y [R, N] the output; bias [N], zeros where the layer has none; noise_floor [2, N]: float32's own rounding
    error of each output channel, over the captured rows and over the probes; rank: axes of the layer's input in the
    model. The lowered graph rounds the product, before scales and bias, to `products`.
    """

    layer: str
    weight_format: str
    activation_format: str
    rank: int
    probes: int
    x: Floats
    values: Floats | None
    scales: Floats | None
    y: Floats
    bias: Floats
    noise_floor: Floats
    products: Compute = "fp32"

    def with_fp32_product(self) -> LinearRecord:
        """The record as a graph is compared with it that rounds no product."""
        return self if self.products == "fp32" else replace(self, products="fp32")


@dataclass(frozen=True)
class OutputRecord:
    """One layer's quantized output on R token rows: x [R, N] before, values [R, N] and scales [R, N/G] of it; `rank`
    as the axes of the output in the model."""

    layer: str
    format: str
    rank: int
    x: Floats
    values: Floats
    scales: Floats

    @property
    def rounded(self) -> Floats:
        """What the quantizer gives: [R, N]."""
        grouped = self.values.reshape(*self.scales.shape, -1) * self.scales[..., None]
        return grouped.reshape(self.values.shape)


@dataclass(frozen=True)
class ModelRecord:
    """The whole model on one batch of one timestep.

    inputs: the graph's inputs; boundaries: tensor name → value of everything that enters the first block, of every
    block's output, and of `sample`.
    """

    timestep: float
    inputs: Mapping[str, npt.NDArray[np.generic]]
    boundaries: Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Rounding:
    """SNR in dB of the torch model against itself when its tensors are rounded to `compute`, the worst timestep's.

    `boundaries`: name → when the reference's inputs, rounded, are given; `end_to_end_db`: running free.
    """

    compute: Compute
    boundaries: Mapping[str, float]
    end_to_end_db: float


@dataclass(frozen=True)
class Reference:
    """Everything the gate compares with.

    thresholds: boundary name → least SNR in dB when the reference's inputs are given; `end_to_end_threshold` the same
    for the free-running model. `blocks`: module paths in order. The worst over timesteps of the output's SNR:
    `quantization_db` against the original model's, `sensitivity_db` against its own on inputs changed as little as
    rounding does. `rounding` is what a compute type other than FP32 costs, None for FP32. `outputs` are those of
    layers that are quantized. `free_samples` is how many samples of a batch the graphs run free on, None
    for all; the numbers of running free are then those of the worst so many samples, which all together keep, too.
    """

    linears: tuple[LinearRecord, ...]
    models: tuple[ModelRecord, ...]
    blocks: tuple[str, ...]
    thresholds: Mapping[str, float]
    end_to_end_threshold: float
    quantization_db: float
    sensitivity_db: float
    rounding: Rounding | None = None
    outputs: tuple[OutputRecord, ...] = ()
    free_samples: int | None = None

    def free_inputs(self, model: ModelRecord) -> dict[str, npt.NDArray[Any]]:
        """The inputs of one of the models that a graph runs free on."""
        return {name: array[: self.free_samples] for name, array in model.inputs.items()}

    def free_output(self, model: ModelRecord) -> npt.NDArray[np.generic]:
        """What the model gave on its `free_inputs`."""
        return model.boundaries[OUTPUT][: self.free_samples]

    def for_stage(self, stage: Stage) -> Reference:
        """The reference as a graph of that stage is compared with it: the exported one is FP32 whatever is asked for.

        No limit of the lowered graph asks for more than the torch model itself keeps when it is rounded, less a margin.
        The linears need no such limit: inside they are FP32, but for products, whose rounding has a bound.
        """
        if stage == "exported":
            return replace(self, linears=tuple(record.with_fp32_product() for record in self.linears), rounding=None)
        rounding = self.rounding
        if rounding is None:
            return self
        thresholds = {
            name: min(limit, rounding.boundaries[name] - ROUNDING_MARGIN_DB) for name, limit in self.thresholds.items()
        }
        end_to_end = min(self.end_to_end_threshold, rounding.end_to_end_db - ROUNDING_MARGIN_DB)
        return replace(self, thresholds=thresholds, end_to_end_threshold=end_to_end)

    def given(self, model: ModelRecord) -> dict[str, npt.NDArray[Any]]:
        """The boundaries of one of the models as the compared graph stores them."""
        if self.rounding is None:
            return dict(model.boundaries)
        compute = COMPUTE_TYPES[self.rounding.compute]
        return {name: compute.rounded(np.asarray(array)) for name, array in model.boundaries.items()}

    def save(self, folder: Path) -> None:
        """Write manifest.json and reference.safetensors into `folder`."""
        tensors: dict[str, npt.NDArray[Any]] = {}
        for record in self.linears:
            tensors.update({f"linear/{record.layer}/{key}": value for key, value in _arrays(record).items()})
        for output in self.outputs:
            tensors.update({f"output/{output.layer}/{key}": getattr(output, key) for key in _OUTPUT_ARRAYS})
        for index, model in enumerate(self.models):
            tensors.update({f"model/{index}/input/{name}": array for name, array in model.inputs.items()})
            tensors.update({f"model/{index}/boundary/{name}": array for name, array in model.boundaries.items()})
        manifest = {
            "version": _VERSION,
            "linears": [{name: getattr(record, name) for name in _FACTS} for record in self.linears],
            "outputs": [{name: getattr(output, name) for name in _OUTPUT_FACTS} for output in self.outputs],
            "timesteps": [model.timestep for model in self.models],
            "blocks": list(self.blocks),
            "thresholds": dict(self.thresholds),
            "end_to_end_threshold": self.end_to_end_threshold,
            "quantization_db": self.quantization_db,
            "sensitivity_db": self.sensitivity_db,
            "free_samples": self.free_samples,
            "rounding": None if self.rounding is None else asdict(self.rounding),
        }
        with atomic_tensor_path(folder / TENSORS) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, temporary)
        write_text_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """Read what `save` wrote; the arrays are the file itself, mapped into memory.

        Raises:
            InputError: nothing is there, or it is not what `save` writes.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            tensors = {name: tensor.numpy() for name, tensor in load_file(folder / TENSORS).items()}
        except FileNotFoundError as error:
            raise InputError(
                f"{error.filename or folder}: no validation reference; export again without --no-validate"
            ) from error
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder}: the validation reference cannot be read: {error}") from error
        try:
            return cls._from_parts(manifest, tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / MANIFEST}: not a validation reference of this version ({error})") from error

    @classmethod
    def _from_parts(cls, manifest: dict[str, Any], tensors: dict[str, npt.NDArray[Any]]) -> Reference:
        if manifest["version"] != _VERSION:
            raise KeyError(f"version {manifest['version']}")
        linears = []
        for facts in manifest["linears"]:
            parts: dict[str, Any] = {"values": None, "scales": None, **_below(tensors, f"linear/{facts['layer']}/")}
            linears.append(LinearRecord(**facts, **parts))
        outputs = []
        for facts in manifest["outputs"]:
            parts = {**_below(tensors, f"output/{facts['layer']}/")}
            outputs.append(OutputRecord(**facts, **parts))
        models = [
            ModelRecord(timestep, _below(tensors, f"model/{index}/input/"), _below(tensors, f"model/{index}/boundary/"))
            for index, timestep in enumerate(manifest["timesteps"])
        ]
        return cls(
            tuple(linears),
            tuple(models),
            tuple(manifest["blocks"]),
            manifest["thresholds"],
            manifest["end_to_end_threshold"],
            manifest["quantization_db"],
            manifest["sensitivity_db"],
            None if manifest["rounding"] is None else Rounding(**manifest["rounding"]),
            tuple(outputs),
            manifest["free_samples"],
        )


def _arrays(record: LinearRecord) -> dict[str, Floats]:
    arrays = {name: getattr(record, name) for name in _ARRAYS}
    return {name: array for name, array in arrays.items() if array is not None}


def _below(tensors: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
