"""Runs kernels on the CPU in Triton's interpreter, in a process of its own.

TRITON_INTERPRET is read when Triton is imported, and torch imports it; so no test's own process can do this.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plugins.kernels.spec import Constant, KernelSpec

Arrays = Mapping[str, npt.NDArray[Any]]


class TritonInterpreter:
    """A process that stays until `close`, since importing Triton and torch takes seconds."""

    def __init__(self) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._folder = tempfile.TemporaryDirectory()
        self._log = (Path(self._folder.name) / "log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.plugins.triton_interpreter"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def run(
        self, spec: KernelSpec, inputs: Arrays, scalars: Mapping[str, int], outputs: Arrays, **constants: Constant
    ) -> dict[str, npt.NDArray[Any]]:
        """What the kernel leaves in `outputs`, which are passed as they are, by name. `constants` replace the spec's.

        Arrays are passed as bytes and read as the pointers' elements, so bfloat16 can be one of ml_dtypes' arrays.
        """
        path = Path(self._folder.name) / "arrays.npz"
        arrays = {name: array.view(np.uint8) for name, array in {**inputs, **outputs}.items()}
        np.savez(path, **arrays)
        request = {"path": str(path), "spec": asdict(spec), "scalars": dict(scalars), "constants": constants}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise AssertionError(Path(self._log.name).read_text()[-3000:])
        with np.load(path) as left:
            return {name: left[name].view(array.dtype).reshape(array.shape) for name, array in outputs.items()}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._folder.cleanup()


def answer(request: dict[str, Any]) -> None:
    """Launch the kernel on the arrays in the file, and write its outputs there."""
    import torch

    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
    types |= {"i8": torch.int8, "i32": torch.int32}
    spec = request["spec"]
    module, _, name = spec["source"].partition(":")
    function = getattr(importlib.import_module(module), name)
    with np.load(request["path"]) as file:
        arrays = {key: torch.from_numpy(file[key].copy()) for key in file.files}
    pointers = [
        [arrays[pointer["name"]].view(types[pointer["element"]]) for pointer in spec[group]]
        for group in ("inputs", "outputs")
    ]
    scalars = [request["scalars"][name] for name in spec["scalars"]]
    constants = {**spec["constants"], **request["constants"]}
    free = [name for name in function.arg_names if name not in constants]
    arguments = dict(zip(free, [*pointers[0], *scalars, *pointers[1]], strict=True))
    launch = spec["launch"]
    programs = -(-request["scalars"]["rows"] // launch["rows_per_program"]) * launch["columns"]
    function[(programs,)](**arguments, **constants)
    np.savez(request["path"], **{pointer["name"]: arrays[pointer["name"]].numpy() for pointer in spec["outputs"]})


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        answer(json.loads(line))
        answers.write("done\n")
        answers.flush()


if __name__ == "__main__":
    main()
