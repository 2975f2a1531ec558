"""README.md of a bundle: what is in it, and the two commands for the device."""

from __future__ import annotations

import shlex

from exporter.bundle.manifest import Manifest, TargetEntry
from exporter.device.acceptance import MOST_ASKED_DB
from plugins.tensorrt_plugins.releases import OLDEST_TENSORRT

README = "README.md"

_RUNNERS = {"onnxruntime": "--onnxrt", "tensorrt": "--trt", "tensorrt-rtx": "--trt"}


def readme_text(manifest: Manifest, folder: str) -> str:
    """The text, for a bundle in a folder of that name; `manifest` need not list its files yet."""
    weights = manifest.weights
    origin = f" (stated in its {weights.licence_from})" if weights.licence_from else ": its folder states none"
    copy = f"; its text is in `{weights.licence_file}`" if weights.licence_file else ""
    parts = [
        f"# {manifest.name}\n",
        f"A diffusion transformer with low-bit weights, exported by fp4export {manifest.versions['fp4export']}. "
        "Opening this folder runs nothing in it: every file is first checked against `manifest.json`.\n",
        f"Weights: {weights.source}. Licence of the weights: **{weights.licence}**{origin}{copy}.\n",
        "Needed on the device: fp4export, numpy, onnx, polygraphy, and TensorRT (or ONNX Runtime for `cpu`). The "
        f"commands are for the folder that `{folder}` is in.\n",
        *(_section(target, folder) for target in manifest.targets),
        "`fp4export build` names a file that was changed, lost or added, and builds nothing then; where fp4export is "
        f"installed with everything it needs, so does `fp4export inspect {shlex.quote(folder)}`.\n",
    ]
    return "\n".join(parts)


def check_command(target: TargetEntry, folder: str, engine: str) -> str:
    """The `polygraphy` line that compares an engine's output with the reference's; "" without acceptance files."""
    if target.acceptance is None:
        return ""
    accepted = target.acceptance
    words = ["polygraphy", "run", engine, _RUNNERS[target.engine]]
    words += [] if target.engine == "onnxruntime" else ["--model-type", "engine"]
    words += ["--load-inputs", f"{folder}/{accepted.inputs}", "--load-outputs", f"{folder}/{accepted.reference}"]
    least_db = accepted.snr_db if target.engine == "onnxruntime" else min(accepted.snr_db, MOST_ASKED_DB)
    words += ["--compare", "snr", "--snr-threshold", f"{least_db:g}"]
    prefix = "POLYGRAPHY_USE_TENSORRT_RTX=1 " if target.engine == "tensorrt-rtx" else ""
    return prefix + shlex.join(words)


def _section(target: TargetEntry, folder: str) -> str:
    lines = [f"## {target.name}\n", "```sh"]
    if target.engine == "onnxruntime":
        engine = f"{folder}/{target.lowered}"
        lines.append(f"fp4export validate {shlex.quote(folder)}   # {target.lowered} is what ONNX Runtime runs")
    else:
        engine = f"{target.name}.plan"
        lines.append(shlex.join(["fp4export", "build", folder, "--target", target.name, "-o", engine]))
    check = check_command(target, folder, engine)
    lines += [check] if check else []
    lines.append("```\n")
    if target.kernels is not None:
        lines.append(f"Its plugins need TensorRT ≥ {'.'.join(map(str, OLDEST_TENSORRT))} and `{target.kernels}/`.\n")
    if target.acceptance is None:
        lines.append("It was exported without validation, so there is nothing to compare an engine with.\n")
    return "\n".join(lines)
