"""What an engine can be built for, which number containers each target multiplies in, and which one a layer gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from exporter.errors import InputError, did_you_mean
from exporter.gpu import Gpu, local_gpu

Engine = Literal["onnxruntime", "tensorrt-rtx", "tensorrt"]
Kernels = Literal["native", "plugin"]
Storage = Literal["packed", "container"]

AUTO = "auto"
DEFAULT_RTX = "rtx-sm89"
SUFFIXES: Mapping[Engine, tuple[str, ...]] = MappingProxyType(
    {"onnxruntime": (".onnx",), "tensorrt-rtx": (".plan", ".engine"), "tensorrt": (".plan", ".engine")}
)


@dataclass(frozen=True)
class Target:
    """One kind of machine.

    `containers` are the ones it multiplies in (fp32 and fp16 aside), best first. `parsers` are the TensorRT releases
    whose ONNX parsers must all take its graphs: releases in between take what the first and the last do. Without
    `fp32_products` the builder has no matrix product whose result is FP32, so that all have FP16 results.

    `kernels` says whose kernels multiply: TensorRT's own, or this project's as plugins, which multiply in
    `plugin_containers` (none where the engine takes no plugins); `containers` are those of the kernels chosen.
    `storage` says how the output holds weights of 4 bits for kernels that are not plugins, which read packed ones:
    packed, too, or as their container multiplies them.
    """

    name: str
    engine: Engine
    compute_capability: tuple[int, int] | None
    containers: tuple[str, ...]
    parsers: tuple[str, ...] = ()
    fp32_products: bool = True
    plugin_containers: tuple[str, ...] = ()
    kernels: Kernels = "native"
    storage: Storage = "container"

    def with_kernels(self, kernels: Kernels) -> Target:
        """The same machine with these kernels. Raises `InputError` where its engine takes no plugins."""
        if kernels == self.kernels:
            return self
        if kernels == "native":
            return replace(get_target(self.name), storage=self.storage)
        if not self.plugin_containers:
            able = ", ".join(target.name for target in _TABLE if target.plugin_containers)
            reason = (
                "TensorRT-RTX has no plugins"
                if self.engine == "tensorrt-rtx"
                else "ONNX Runtime has no kernels of ours"
            )
            raise InputError(f"target {self.name} takes `kernels: native` only, since {reason}; plugins run on: {able}")
        return replace(self, kernels=kernels, containers=self.plugin_containers)

    def with_storage(self, storage: Storage) -> Target:
        """The same machine with weights held like this. Raises `InputError` where it cannot hold them so."""
        if storage == "packed" and not self.fp32_products:
            raise InputError(
                f"target {self.name} takes `storage: container` only, since its products in FP16 are bounded by "
                "weights that are constants; drop `storage`"
            )
        return replace(self, storage=storage)

    @property
    def storage_text(self) -> str:
        """How weights of 4 bits are stored."""
        return f"packed in plugins, else {self.storage}" if self.kernels == "plugin" else self.storage

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of an output file for this target."""
        return SUFFIXES[self.engine]


@dataclass(frozen=True)
class TargetChoice:
    """A target and, in words, why it was chosen."""

    target: Target
    reason: str


_INT = ("int8", "int4")
_FLOAT8 = ("int8", "fp8", "int4")
_BLACKWELL = ("int8", "fp8", "int4", "fp4", "mxfp8")

# FP16 multiplies what only FP8 would hold, where there is no FP8, and weights alone.
_PLUGIN_INT = ("int8", "fp16")
_PLUGIN_FLOAT8 = ("int8", "fp8", "fp16")
_PLUGIN_BLACKWELL = ("int8", "fp8", "fp16", "fp4", "mxfp8")

# TensorRT-RTX's parser takes what TensorRT 11's does. A Jetson Orin has 10.3 (JetPack 6) or 11 (JetPack 7.2 and later).
_RTX = ("11",)
_TENSORRT = ("10.3", "11")

_TABLE = (
    Target("cpu", "onnxruntime", None, ("int8",), storage="packed"),
    # TensorRT-RTX 1.7: "FP32 GEMM is not supported" for Turing, and an INT8 product with an FP32 result is one to it.
    Target("rtx-sm75", "tensorrt-rtx", (7, 5), ("int8",), _RTX, fp32_products=False),
    Target("rtx-sm80", "tensorrt-rtx", (8, 0), _INT, _RTX),
    Target("rtx-sm86", "tensorrt-rtx", (8, 6), _INT, _RTX),
    Target("rtx-sm89", "tensorrt-rtx", (8, 9), _FLOAT8, _RTX),
    Target("rtx-sm120", "tensorrt-rtx", (12, 0), _BLACKWELL, _RTX),
    Target("rtx-sm121", "tensorrt-rtx", (12, 1), _BLACKWELL, _RTX),
    Target("orin", "tensorrt", (8, 7), _INT, _TENSORRT, plugin_containers=_PLUGIN_INT),
    Target("l4", "tensorrt", (8, 9), _FLOAT8, _TENSORRT, plugin_containers=_PLUGIN_FLOAT8),
    Target("h100", "tensorrt", (9, 0), _FLOAT8, _TENSORRT, plugin_containers=_PLUGIN_FLOAT8),
    Target("h200", "tensorrt", (9, 0), _FLOAT8, _TENSORRT, plugin_containers=_PLUGIN_FLOAT8),
    Target("b200", "tensorrt", (10, 0), _BLACKWELL, ("11",), plugin_containers=_PLUGIN_BLACKWELL),
    Target("thor", "tensorrt", (11, 0), _BLACKWELL, ("11",), plugin_containers=_PLUGIN_BLACKWELL),
)
TARGETS: Mapping[str, Target] = MappingProxyType({target.name: target for target in _TABLE})


def get_target(name: str) -> Target:
    """The target called `name`. Raises `InputError` with the nearest name."""
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}{did_you_mean(name, TARGETS)}")
    return TARGETS[name]


def resolve_target(name: str, output: Path | str) -> TargetChoice:
    """The target that `name` (possibly ``auto``) means for an output file, and why.

    ``auto`` is `cpu` for ``.onnx``; for ``.plan`` and ``.engine`` the GPU of this machine, or `DEFAULT_RTX`. Raises
    `InputError` for an unknown suffix and for a suffix that the named target does not write.
    """
    suffix = Path(output).suffix
    known = tuple(dict.fromkeys(entry for entries in SUFFIXES.values() for entry in entries))
    if suffix not in known:
        found = f"unknown suffix {suffix!r}" if suffix else "no suffix"
        raise InputError(
            f"{output}: {found}; an output ends in .onnx (ONNX Runtime), .plan or .engine "
            "(TensorRT), or .bundle (of a recipe)"
        )
    if name != AUTO:
        target = get_target(name)
        if suffix not in target.suffixes:
            fitting = ", ".join(entry.name for entry in _TABLE if suffix in entry.suffixes)
            raise InputError(
                f"{output}: target {name} is written as {' or '.join(target.suffixes)}, not {suffix}; "
                f"targets for {suffix}: {fitting}"
            )
        return TargetChoice(target, "as asked for")
    if suffix in SUFFIXES["onnxruntime"]:
        return TargetChoice(TARGETS["cpu"], f"auto: {suffix} runs in ONNX Runtime")
    return _target_of_gpu(local_gpu())


def _target_of_gpu(gpu: Gpu | None) -> TargetChoice:
    default = TARGETS[DEFAULT_RTX]
    if gpu is None:
        return TargetChoice(default, "auto: no GPU here, so the default; another with --target")
    fitting = [entry for entry in _TABLE if entry.compute_capability == gpu.compute_capability]
    version = gpu.capability_text
    if not fitting:
        reason = f"auto: the default, since no target fits the {gpu.name} here (compute capability {version})"
        return TargetChoice(default, reason)
    return TargetChoice(fitting[0], f"auto: the {gpu.name} here (compute capability {version})")
