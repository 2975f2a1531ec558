"""What the builder's process is asked, and what it answers: JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Stage: TypeAlias = Literal["build", "load", "compare"]
CacheState: TypeAlias = Literal["off", "new", "used", "of another version or GPU"]

MARK = "fp4export:"
"""What a line of the process's output begins with that is a message; other lines are TensorRT's."""


@dataclass(frozen=True)
class EngineJob:
    """What to build: an ONNX file into an engine file, with shapes (min, opt, max) of the dynamic inputs.

    `compute_capability` is (major, minor) of the GPU, which only TensorRT-RTX need not have.
    `workspace` is the most bytes of scratch memory, None for TensorRT's own limit; `timing_cache` the file that
    measurements are read from and `new_timing_cache` the one that they are written to, None without. `plugins` are the
    op_types that TensorRT must have as plugins, and `kernels` the folder with their kernels, None without plugins.
    """

    onnx: str
    engine: str
    rtx: bool
    compute_capability: tuple[int, int]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    workspace: int | None = None
    timing_cache: str | None = None
    new_timing_cache: str | None = None
    plugins: tuple[str, ...] = ()
    kernels: str | None = None

    def to_json(self) -> str:
        """The job as an argument of the worker's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineJob:
        """The inverse of `to_json`."""
        facts = json.loads(text)
        capability = facts.pop("compute_capability")
        shapes = {
            name: (tuple(least), tuple(best), tuple(most)) for name, (least, best, most) in facts.pop("shapes").items()
        }
        plugins = tuple(facts.pop("plugins"))
        return cls(shapes=shapes, plugins=plugins, compute_capability=(capability[0], capability[1]), **facts)


@dataclass(frozen=True)
class EngineCheck:
    """What to do with a finished engine in a process that did not build it: load it, and write what TensorRT's
    inspector says to `layers`; or run it on `inputs` and compare with `outputs`, polygraphy's files."""

    engine: str
    rtx: bool
    layers: str = ""
    inputs: str = ""
    outputs: str = ""

    def to_json(self) -> str:
        """The check as an argument of the worker's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineCheck:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


def message(kind: str, **facts: object) -> str:
    """One line of the process's output."""
    return MARK + json.dumps({"kind": kind, **facts})


def read_message(line: str) -> dict[str, Any] | None:
    """The inverse of `message`; None for a line that is none."""
    if not line.startswith(MARK):
        return None
    try:
        facts = json.loads(line[len(MARK) :])
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and "kind" in facts else None
