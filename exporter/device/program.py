"""`fp4export build` and `fp4export doctor`: a program that needs numpy, onnx, polygraphy and tensorrt alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from exporter.errors import InputError
from exporter.failures import EXIT_INTERRUPTED, describe_failure, fail

COMMANDS = ("build", "doctor")
BUNDLE_SUFFIX = ".bundle"
BUILD_SUMMARY = "Build a lowered graph into an engine, on the device that it is for."
DOCTOR_SUMMARY = "Show what this machine has, and what each target needs."

_BUILD_ABOUT = f"""{BUILD_SUMMARY}

MODEL is the lowered graph of an export, NAME.work/lowered.TARGET.onnx (with its .onnx.data and
lowered.TARGET.kernels/ beside it where the export made them), or NAME.bundle, every byte of which is checked first.
Needed here: Python with numpy, onnx and polygraphy, and TensorRT (10.3 or later, by target) or TensorRT-RTX. TensorRT
builds on the GPU that the engine is for; TensorRT-RTX builds anywhere.

Where that GPU is, the finished engine is loaded by a fresh process, TensorRT's inspector is asked whether every
quantized layer reads 8- or 4-bit numbers or is a plugin, and the inputs that the export saved in gate.TARGET/ are run
and compared. Without the GPU these are reported as not run.

Beside OUT (here NAME.plan) it writes
  NAME.timing.cache   TensorRT's measurements: the next build on this GPU takes a fraction of the time
  NAME.layers.json    what the inspector says of every layer
"""
_BUILD_EXAMPLES = """examples:
  fp4export build my.bundle -o engine.plan
  fp4export build lowered.orin.onnx -o engine.plan --target orin
  fp4export build lowered.h100.onnx -o engine.plan --target h100 --batch 2:8:16 --workspace 4G
  fp4export build lowered.rtx-sm89.onnx -o engine.plan --target rtx-sm89

exit codes: 0 done; 2 bad input; 3 this machine lacks something; 4 a check of the engine failed; 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """Mistakes become `InputError`, so that they look like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(words: Sequence[str]) -> int:
    """Run `words`, the first of which is one of `COMMANDS`, and return the exit code."""
    debug = "--debug" in words
    try:
        return _run(list(words))
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written", EXIT_INTERRUPTED, debug=debug)
    except Exception as error:  # noqa: BLE001 - the outermost boundary: a defect must not look like bad input
        return fail(*describe_failure(error), debug=debug)


def _run(words: list[str]) -> int:
    options = _arguments().parse_args(words)
    return _doctor(options) if options.command == "doctor" else _build(options)


def _arguments() -> argparse.ArgumentParser:
    parser = _Parser(prog="fp4export", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build",
        help=BUILD_SUMMARY,
        description=_BUILD_ABOUT,
        epilog=_BUILD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    build.add_argument("model", metavar="MODEL", help="the lowered graph, MODEL.onnx, or a whole NAME.bundle")
    build.add_argument("-o", "--output", metavar="OUT", required=True, help="the engine: NAME.plan or NAME.engine")
    build.add_argument("--target", metavar="TARGET", help="the machine that OUT is for (default: what MODEL is for)")
    build.add_argument(
        "--batch", default="1:2:16", metavar="MIN:BEST:MAX", help="batch sizes that the engine takes (default: 1:2:16)"
    )
    build.add_argument("--workspace", metavar="SIZE", help="most scratch memory, e.g. 2G (default: what is free)")
    build.add_argument("--gate", metavar="DIR", help="saved inputs and outputs (default: gate.TARGET beside MODEL)")
    build.add_argument("--no-acceptance", action="store_true", help="skip the comparison with the saved outputs")
    build.add_argument("--no-timing-cache", action="store_true", help="neither use nor write NAME.timing.cache")
    doctor = commands.add_parser("doctor", help=DOCTOR_SUMMARY, description=DOCTOR_SUMMARY, allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    for command in (build, doctor):
        command.add_argument("--quiet", action="store_true", help="print nothing but errors")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _build(options: argparse.Namespace) -> int:
    from exporter.device.build import BuildOptions, build_engine
    from exporter.device.graph import read_lowered
    from exporter.device.profiles import BatchRange
    from exporter.device.sizes import parse_size, size
    from exporter.device.terminal import PlainProgress
    from exporter.targets import resolve_target

    model, output = Path(options.model), Path(options.output)
    if model.is_dir() or model.suffix == BUNDLE_SUFFIX:
        model = _graph_in_bundle(model, output, options.target)
    workspace = None if options.workspace is None else parse_size(options.workspace)
    if options.workspace is not None and workspace is None:
        raise InputError(f"--workspace {options.workspace}: must be a size such as 512M or 2G")
    gate = None if options.gate is None else Path(options.gate)
    if gate is not None and not gate.is_dir():
        raise InputError(f"--gate {gate}: no such folder; an export writes NAME.work/gate.TARGET")
    name = options.target or read_lowered(model).lowered_for.name
    target = resolve_target(name, output).target
    if target.engine == "onnxruntime":
        raise InputError(f"target {target.name} needs no engine: ONNX Runtime runs the .onnx file as it is")
    if output.is_dir():
        raise InputError(f"{output}: is a folder; give the output another name")
    build_options = BuildOptions(
        batch=BatchRange.parse(options.batch),
        workspace=workspace,
        timing_cache=not options.no_timing_cache,
        acceptance=not options.no_acceptance,
        gate=gate,
    )
    info = build_engine(model, output, target, PlainProgress(quiet=options.quiet), build_options)
    if not options.quiet:
        sys.stdout.write(f"engine   {info.path} ({size(info.size_bytes)}, {info.builder}, {info.seconds:.1f} s)\n")
    return 0


def _graph_in_bundle(folder: Path, output: Path, target: str | None) -> Path:
    """The lowered graph for `target`, or for the GPU here, in a bundle whose files have all been checked."""
    from exporter.bundle.read import open_bundle
    from exporter.gpu import local_gpu

    if folder.resolve() in output.resolve().parents:
        raise InputError(f"{output}: is inside the bundle, which would be no bundle any more; write it beside {folder}")
    gpu = local_gpu() if target is None else None
    return open_bundle(folder).target(target, None if gpu is None else gpu.compute_capability).lowered


def _doctor(options: argparse.Namespace) -> int:
    from exporter.device.doctor import examine, report_text

    report = examine()
    if not options.quiet or options.json:
        sys.stdout.write((report.to_json() if options.json else report_text(report)) + "\n")
    return 0
