"""An engine that is built to be looked into, and its one run: here where its GPU is, else on the device."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from exporter.bisect.recording import checksums_command, checksums_path
from exporter.device.build import BuildOptions, build_engine, device_command
from exporter.device.requirements import missing_builder
from exporter.errors import EnvironmentLacksError, InputError
from exporter.files import write_text_atomically
from exporter.gate.runs import Arrays, save_feeds
from exporter.gate.whole import read_by
from exporter.gpu import local_gpu
from exporter.onnx_files import checksum_of, save_onnx
from exporter.progress import Progress
from exporter.targets import Target
from plugins.kernels.library import kernels_folder

_INPUTS = ".inputs.json"


@dataclass(frozen=True)
class DeviceRun:
    """The files NAME.* in `folder`, all that a device needs to run one engine: the graph, its kernels, the engine where
    it could be built, inputs as polygraphy reads them, and the script that leaves the outputs."""

    folder: Path
    name: str
    target: Target

    def file(self, ending: str) -> Path:
        """NAME with this ending."""
        return self.folder / f"{self.name}{ending}"

    @property
    def outputs(self) -> Path:
        """What the run leaves, polygraphy's file."""
        return self.file(".outputs.json")

    @property
    def script(self) -> Path:
        """The run, for `sh`."""
        return self.file(".sh")

    def prepare(self, model: onnx.ModelProto, feeds: Sequence[Arrays], lowered: Path, progress: Progress) -> None:
        """Write everything anew for a run of `model`, which was made of the graph `lowered` and takes its kernels.

        The engine is built where its builder runs here. Raises as `build_engine` does, and `InputError` where
        outputs are that a device left: those are not to be lost.
        """
        if self.outputs.exists():
            raise InputError(
                f"{self.outputs}: is there already; go on with it (add --against {self.outputs}) or remove it to begin "
                "anew"
            )
        self.folder.mkdir(exist_ok=True)
        graph, engine, kernels = self.file(".onnx"), self.file(".plan"), kernels_folder(lowered)
        engine.unlink(missing_ok=True)
        shutil.rmtree(kernels_folder(graph), ignore_errors=True)
        save_onnx(model, graph)
        if kernels.is_dir():
            shutil.copytree(kernels, kernels_folder(graph))
        save_feeds([read_by(model, feed) for feed in feeds], self.file(_INPUTS))
        built_here = not missing_builder(self.target)
        write_text_atomically(self.script, self._commands(checksum_of(lowered), build=not built_here))
        if built_here:
            build_engine(graph, engine, self.target, progress, BuildOptions(acceptance=False, timing_cache=False))

    def _commands(self, lowered_sha256: str, *, build: bool) -> str:
        """Paths are relative to the script, which may be on another machine than it was written on.

        What an earlier run left there, an engine of another graph or its outputs, is not taken for this one's.
        """
        graph, engine = Path(f"{self.name}.onnx"), Path(f"{self.name}.plan")
        words = ["polygraphy", "run", str(engine), "--trt", "--model-type", "engine"]
        words += ["--load-inputs", f"{self.name}{_INPUTS}", "--save-outputs", self.outputs.name]
        rtx = "POLYGRAPHY_USE_TENSORRT_RTX=1 " if self.target.engine == "tensorrt-rtx" else ""
        lines = ["#!/bin/sh", "set -e", 'cd "$(dirname "$0")"', f"rm -f {self.outputs.name}"]
        lines += [f"{device_command(graph, engine, self.target)} --no-acceptance"] if build else []
        return "\n".join([*lines, rtx + shlex.join(words), checksums_command(self.outputs, lowered_sha256), ""])

    @property
    def runs_here(self) -> bool:
        """Whether the engine is there, and the GPU that it is for."""
        gpu = local_gpu()
        return (
            gpu is not None
            and gpu.compute_capability == self.target.compute_capability
            and self.file(".plan").is_file()
        )

    def forget(self) -> None:
        """Remove the outputs of a run here, which another one leaves again."""
        for file in (self.outputs, checksums_path(self.outputs)):
            file.unlink(missing_ok=True)

    def run(self) -> None:
        """Run the script here. Raises `EnvironmentLacksError` with its last words."""
        own = Path(sys.executable).parent
        environment = {**os.environ, "PATH": os.pathsep.join([str(own), os.environ.get("PATH", "")])}
        command = ["/bin/sh", str(self.script)]
        done = subprocess.run(  # noqa: S603 - the script that was just written
            command, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode or not self.outputs.is_file():
            lines = [line for line in (*done.stdout.splitlines(), *done.stderr.splitlines()) if line.strip()]
            reason = lines[-1].strip() if lines else f"status {done.returncode}"
            raise EnvironmentLacksError(f"{self.script}: {reason}")
