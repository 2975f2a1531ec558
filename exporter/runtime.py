"""Running an exported graph in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from exporter.errors import InputError, did_you_mean
from exporter.memory import return_freed_memory

_PROVIDERS = ["CPUExecutionProvider"]
_ERRORS_ONLY = 3

# Fuses quantized activations with FP8 weights into an integer operator that it then refuses, and a weight-only
# DequantizeLinear with its MatMul into one that quantizes the activations to 8 bits.
_QDQ_FUSION = "QDQSelectorActionTransformer"

_FOLDING = "ConstantFolding"

_ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)

_NUMPY_TYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "tensor(float)": np.dtype(np.float32),
        "tensor(float16)": np.dtype(np.float16),
        "tensor(double)": np.dtype(np.float64),
        "tensor(int64)": np.dtype(np.int64),
        "tensor(int32)": np.dtype(np.int32),
        "tensor(int8)": np.dtype(np.int8),
        "tensor(uint8)": np.dtype(np.uint8),
        "tensor(bool)": np.dtype(np.bool_),
    }
)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: its name, numpy type (None for types that numpy lacks) and sizes (a name where dynamic)."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str, ...]


class OnnxSession:
    """A graph ready to run.

    The arithmetic is the graph's own: the one optimization that changes it is switched off where the graph has
    DequantizeLinear nodes.
    """

    def __init__(
        self, source: Path | str | onnx.ModelProto, threads: int | None = None, *, fold_constants: bool = True
    ) -> None:
        """Load a file or a model; `threads` limits the CPU threads of one operator (default: all cores). Without
        `fold_constants`, what depends on constants alone is computed in every run instead of being kept in memory.

        Raises `InputError` for a file that is missing, unreadable or no ONNX model, and for a model that ONNX Runtime
        cannot run.
        """
        self.name = "the ONNX model" if isinstance(source, onnx.ModelProto) else str(source)
        model = source if isinstance(source, onnx.ModelProto) else read_model(Path(source), external_data=False)
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        # Idle threads would spin on the cores that torch computes on between two runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        dequantizes = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
        disabled = [_QDQ_FUSION] * dequantizes + [_FOLDING] * (not fold_constants)
        content = source.SerializeToString() if isinstance(source, onnx.ModelProto) else str(source)
        try:
            self._session = ort.InferenceSession(content, options, providers=_PROVIDERS, disabled_optimizers=disabled)
        except _ORT_ERRORS as error:
            raise InputError(f"{self.name}: ONNX Runtime cannot run it: {_first_line(error)}") from error
        # Expanding 4-bit weights frees ten times their final size.
        return_freed_memory()
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())

    def run(
        self, feeds: Mapping[str, npt.NDArray[Any]], outputs: Iterable[str] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name (FP8 ones as their bytes, uint8); `outputs` asks for some of them only.

        Raises `InputError` for a missing, unknown or misshapen input, and for an unknown output.
        """
        self._check(feeds)
        names = [spec.name for spec in self.outputs] if outputs is None else list(outputs)
        known = [spec.name for spec in self.outputs]
        for name in names:
            if name not in known:
                raise InputError(f"{self.name}: no output {name!r}{did_you_mean(name, known)}")
        try:
            # Not np.ascontiguousarray, which gives a scalar an axis.
            arrays = {name: np.asarray(array, order="C") for name, array in feeds.items()}
            results = self._session.run(names, arrays) if names else []
        except _ORT_ERRORS as error:
            raise InputError(f"{self.name}: ONNX Runtime failed: {_first_line(error)}") from error
        return dict(zip(names, results, strict=True))

    def _check(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        known = [spec.name for spec in self.inputs]
        for name in feeds:
            if name not in known:
                raise InputError(f"{self.name}: no input {name!r}{did_you_mean(name, known)}")
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name not in feeds:
                raise InputError(f"{self.name}: input {spec.name!r} is missing; it needs {', '.join(known)}")
            array = feeds[spec.name]
            if spec.dtype is not None and array.dtype != spec.dtype:
                raise InputError(f"{self.name}: input {spec.name!r} must be {spec.dtype}, not {array.dtype}")
            fits = len(array.shape) == len(spec.shape) and all(
                size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size))
                for size, wanted in zip(array.shape, spec.shape, strict=True)
            )
            if not fits:
                wanted_shape = ", ".join(str(size) for size in spec.shape)
                raise InputError(
                    f"{self.name}: input {spec.name!r} must be [{wanted_shape}], not {list(array.shape)}"
                    + "".join(f"; {name} is {size} here" for name, size in sizes.items() if name in spec.shape)
                )


def read_model(path: Path, *, external_data: bool = True) -> onnx.ModelProto:
    """The ONNX model in a file. Raises `InputError` for one that is missing, unreadable or not ONNX."""
    try:
        model = onnx.load(path, load_external_data=external_data)
    except (OSError, onnx.checker.ValidationError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except DecodeError as error:
        raise InputError(f"{path}: not an ONNX file, or a damaged one") from error
    if not model.graph.node:
        raise InputError(f"{path}: not an ONNX file, or one without a graph")
    return model


def _spec(value: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(str(value.name), _NUMPY_TYPES.get(value.type), shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
