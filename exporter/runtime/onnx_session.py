"""Running a graph on numpy arrays, in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from exporter.errors import InputError, did_you_mean
from exporter.memory import return_freed_memory
from exporter.onnx_files import read_model
from exporter.runtime.arena import share_arena
from exporter.runtime.signature import TensorSpec, check_shapes

Provider = str | tuple[str, dict[str, str]]
"""A provider of ONNX Runtime by name, with its options where it has any."""

CPU_PROVIDERS = ("CPUExecutionProvider",)
_ERRORS_ONLY = 3

# Fuses quantized activations with FP8 weights into an integer operator that it then refuses, and a weight-only
# DequantizeLinear with its MatMul into one that quantizes the activations to 8 bits.
_QDQ_FUSION = "QDQSelectorActionTransformer"
_FOLDING = "ConstantFolding"

ORT_ERRORS = (
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


class OnnxSession:
    """A graph ready to run.

    The arithmetic is the graph's own: the one optimization that changes it is switched off where the graph has
    DequantizeLinear nodes.
    """

    def __init__(
        self,
        source: Path | str | onnx.ModelProto,
        threads: int | None = None,
        *,
        fold_constants: bool = True,
        shares_arena: bool = False,
    ) -> None:
        """Load a file, or a model of less than protobuf's 2 GiB; `threads` limits the CPU threads of one operator
        (default: all cores). Without `fold_constants`, what depends on constants alone is computed in every run instead
        of being kept in memory; `shares_arena`: see `exporter.runtime.arena`.

        Raises `InputError` for a file that is missing, unreadable or no ONNX model, and for a model that ONNX Runtime
        cannot run.
        """
        self.name = _name_of(source)
        self._session = create_session(
            source, threads, CPU_PROVIDERS, fold_constants=fold_constants, shares_arena=shares_arena
        )
        self.inputs = tuple(spec_of(value) for value in self._session.get_inputs())
        self.outputs = tuple(spec_of(value) for value in self._session.get_outputs())

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
        except ORT_ERRORS as error:
            raise InputError(f"{self.name}: ONNX Runtime failed: {first_line(error)}") from error
        return dict(zip(names, results, strict=True))

    def _check(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        check_shapes(self.name, self.inputs, {name: array.shape for name, array in feeds.items()})
        for spec in self.inputs:
            array = feeds[spec.name]
            if spec.dtype is not None and array.dtype != spec.dtype:
                raise InputError(f"{self.name}: input {spec.name!r} must be {spec.dtype}, not {array.dtype}")


def create_session(
    source: Path | str | onnx.ModelProto,
    threads: int | None,
    providers: Sequence[Provider],
    *,
    fold_constants: bool = True,
    shares_arena: bool = False,
) -> ort.InferenceSession:
    """ONNX Runtime's session for a file or a model, without the one optimization that would change its arithmetic.

    Raises `InputError` as `OnnxSession` does.
    """
    model = source if isinstance(source, onnx.ModelProto) else read_model(Path(source), external_data=False)
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    # Idle threads would spin on the cores that torch computes on between two runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if shares_arena:
        share_arena(options)
    if threads is not None:
        options.intra_op_num_threads = threads
    dequantizes = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    disabled = [_QDQ_FUSION] * dequantizes + [_FOLDING] * (not fold_constants)
    content = source.SerializeToString() if isinstance(source, onnx.ModelProto) else str(source)
    try:
        # Otherwise it would go on with the CPU alone where a GPU cannot be had, and with all optimizations.
        session = ort.InferenceSession(
            content, options, providers=list(providers), disabled_optimizers=disabled, enable_fallback=0
        )
    except (*ORT_ERRORS, RuntimeError) as error:
        raise InputError(f"{_name_of(source)}: ONNX Runtime cannot run it: {first_line(error)}") from error
    # Expanding 4-bit weights frees ten times their final size.
    return_freed_memory()
    return session


def _name_of(source: Path | str | onnx.ModelProto) -> str:
    return "the ONNX model" if isinstance(source, onnx.ModelProto) else str(source)


def spec_of(value: Any) -> TensorSpec:
    """The signature of one of a session's inputs or outputs."""
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(str(value.name), _NUMPY_TYPES.get(value.type), shape)


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]
