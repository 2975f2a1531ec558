"""`fp4export doctor`: what this machine has, and for each target whether it can build here or the one thing missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from exporter.device.machine import Machine, look_around
from exporter.device.requirements import missing_builder
from exporter.device.sizes import size
from exporter.device.versions import version_of
from exporter.targets import TARGETS, Target
from plugins.tensorrt_plugins.releases import OLDEST_TENSORRT

_BUILD_PACKAGES = ("numpy", "onnx", "ml_dtypes", "polygraphy")
_NO_DOT_PRODUCTS = "this CPU has no 8-bit dot product (VNNI): W4A8 with INT8 activations is not exact here"
_EXPORT_PACKAGES = ("torch", "diffusers", "onnxruntime")


@dataclass(frozen=True)
class Verdict:
    """Whether an engine for `target` can be made of a lowered graph here; `missing` is the one thing, and how to get
    it, else ""; `note` says what is limited."""

    target: str
    ready: bool
    missing: str
    note: str


@dataclass(frozen=True)
class Report:
    """The machine, whether recipes can be exported here ("" or what is missing), and each target."""

    machine: Machine
    export_missing: str
    targets: tuple[Verdict, ...]

    def to_json(self) -> str:
        """One indented JSON document with the same names."""
        return json.dumps(asdict(self), indent=1)


def examine(machine: Machine | None = None) -> Report:
    """Look at this machine and every target. Needs none of the packages that it reports on."""
    machine = machine or look_around()
    absent = [name for name in _EXPORT_PACKAGES if not machine.packages[name]]
    export_missing = f"{', '.join(absent)}: pip install fp4export" if absent else ""
    return Report(machine, export_missing, tuple(_verdict(target, machine) for target in TARGETS.values()))


def _verdict(target: Target, machine: Machine) -> Verdict:
    if target.engine == "onnxruntime":
        missing = "" if machine.packages["onnxruntime"] else "onnxruntime is not installed (pip install onnxruntime)"
        note = "" if machine.has_int8_dot_products else _NO_DOT_PRODUCTS
        return Verdict(target.name, not missing, missing, note)
    absent = [name for name in _BUILD_PACKAGES if not machine.packages[name]]
    missing = f"{absent[0]} is not installed (pip install {' '.join(absent)})" if absent else missing_builder(target)
    return Verdict(target.name, not missing, missing, "" if missing else _limits(target, machine))


def _limits(target: Target, machine: Machine) -> str:
    if target.engine == "tensorrt-rtx":
        here = machine.gpu is not None and machine.gpu.compute_capability == target.compute_capability
        return "" if here else "built here, but run and checked only on its GPU"
    if version_of(machine.packages["tensorrt"]) < OLDEST_TENSORRT:
        oldest = ".".join(map(str, OLDEST_TENSORRT))
        return f"without plugins (kernels: native): they need TensorRT {oldest} or later"
    return ""


def report_text(report: Report) -> str:
    """The report for people."""
    lines = [f"{name:<14} {value}" for name, value in _facts(report.machine).items()]
    lines += ["", f"{'export':<14} {'yes' if not report.export_missing else f'no: {report.export_missing}'}"]
    for verdict in report.targets:
        answer = "yes" if verdict.ready else f"no: {verdict.missing}"
        lines.append(f"{verdict.target:<14} {answer}{f' ({verdict.note})' if verdict.note else ''}")
    return "\n".join(lines)


def _facts(machine: Machine) -> Mapping[str, str]:
    facts = {"Python": f"{machine.python} on {machine.system}"}
    facts |= {name: version or "not installed" for name, version in machine.packages.items()}
    facts["CPU"] = " ".join(machine.cpu_flags) or "no 8-bit dot product"
    facts["memory"] = "unknown" if machine.memory_bytes is None else f"{size(machine.memory_bytes)} available"
    facts["disk"] = f"{size(machine.disk_free_bytes)} free here"
    gpu = machine.gpu
    if gpu is None:
        facts["GPU"] = "none that CUDA can use"
    else:
        free = "" if machine.gpu_free_bytes is None else f", {size(machine.gpu_free_bytes)} free"
        shared = " shared with the CPU" if gpu.integrated else ""
        facts["GPU"] = (
            f"{gpu.name}, compute capability {gpu.capability_text}, {size(gpu.memory_bytes)}{shared}{free}, "
            f"CUDA {'.'.join(map(str, gpu.cuda))}"
        )
    facts["driver"] = machine.driver or "no NVIDIA driver"
    if machine.jetson_linux:
        jetpack = f" (JetPack {machine.jetpack})" if machine.jetpack else ""
        facts["Jetson Linux"] = f"{machine.jetson_linux}{jetpack}"
    return facts
