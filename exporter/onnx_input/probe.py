"""A graph run once on given inputs, and what its linear layers read and gave meanwhile."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from exporter.errors import InputError
from exporter.onnx_files import save_onnx
from exporter.runtime import OnnxSession
from plugins.body import Body

Floats = npt.NDArray[np.float32]

ROWS = 128
"""Token rows of every layer that are looked at."""


@dataclass(frozen=True)
class ProbePoint:
    """One linear layer of a graph: the tensors that it reads and gives, and their last axes. A Gemm may transpose x."""

    layer: str
    x: str
    y: str
    in_features: int
    out_features: int
    transposes_input: bool = False


@dataclass(frozen=True)
class Probed:
    """What a layer read and gave: x [R, K] and y [R, N] in float32, and how many axes x has in the graph."""

    x: Floats
    y: Floats
    rank: int


@dataclass(frozen=True)
class ProbedRun:
    """A graph's own outputs, and every point's rows."""

    outputs: Mapping[str, npt.NDArray[Any]]
    layers: Mapping[str, Probed]


def run_probed(
    model: onnx.ModelProto,
    points: Sequence[ProbePoint],
    feeds: Mapping[str, npt.NDArray[Any]],
    folder: Path,
    source: str,
) -> ProbedRun:
    """Run `model` in ONNX Runtime on `feeds` and look at `points`; needs room for the model in `folder` meanwhile.

    Raises `InputError` where the graph does not run, or gives NaN or infinity.
    """
    body = Body("probe/")
    for index, point in enumerate(points):
        _append(body, point, f"probe/{index}")
    own = [value.name for value in model.graph.output]
    with tempfile.TemporaryDirectory(dir=folder) as room:
        path = Path(room) / "probed.onnx"
        save_onnx(_extended(model, body, len(points)), path)
        try:
            # Function bodies decode the weights, and folding would keep every intermediate result of that.
            found = OnnxSession(path, fold_constants=not model.functions).run(feeds)
        except InputError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise InputError(f"{source}: on random inputs: {reason}; --no-validate goes on without") from error
    for name, array in found.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            where = name if name in own else points[int(name.split("/")[1])].layer
            raise InputError(f"{source}: gives NaN or infinity at {where} on random inputs; --no-validate goes on")
    layers = {
        point.layer: Probed(found[f"probe/{index}/x"], found[f"probe/{index}/y"], len(found[f"probe/{index}/shape"]))
        for index, point in enumerate(points)
    }
    return ProbedRun({name: found[name] for name in own}, layers)


def _append(body: Body, point: ProbePoint, name: str) -> None:
    x = body.op("Transpose", point.x, perm=[1, 0]) if point.transposes_input else point.x
    body.op("Shape", x, output=f"{name}/shape")
    for tensor, width, what in ((x, point.in_features, "x"), (point.y, point.out_features, "y")):
        rows = body.op("Reshape", tensor, body.ints(-1, width))
        some = body.op("Slice", rows, body.ints(0), body.ints(ROWS), body.ints(0))
        body.op("Cast", some, output=f"{name}/{what}", to=TensorProto.FLOAT)


def _extended(model: onnx.ModelProto, body: Body, count: int) -> onnx.ModelProto:
    """The model with the body's nodes and outputs."""
    outputs = [
        helper.make_tensor_value_info(f"probe/{index}/{what}", kind, shape)
        for index in range(count)
        for what, kind, shape in (
            ("x", TensorProto.FLOAT, [None, None]),
            ("y", TensorProto.FLOAT, [None, None]),
            ("shape", TensorProto.INT64, [None]),
        )
    ]
    graph = helper.make_graph(
        [*model.graph.node, *body.nodes],
        model.graph.name,
        list(model.graph.input),
        [*model.graph.output, *outputs],
        list(model.graph.initializer),
    )
    return helper.make_model(
        graph,
        functions=list(model.functions),
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
    )
