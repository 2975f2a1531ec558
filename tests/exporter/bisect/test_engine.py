"""An engine's bisection, host to device to host; ONNX Runtime on the device's graph, with a defect, is the device.

The engines that the device would run are built by the real TensorRT-RTX, and run nowhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from polygraphy.comparator import RunResults

from exporter.bisect import device_run
from exporter.bisect.boundary_graph import boundary_of, with_boundaries
from exporter.bisect.device_run import DeviceRun
from exporter.bisect.engine import bisect_engine
from exporter.bisect.recording import check_recording, checksums_path
from exporter.cli import main
from exporter.device.rtx_file import check_rtx_engine
from exporter.errors import InputError
from exporter.gate.runs import Arrays, load_feeds
from exporter.gpu import Gpu
from exporter.onnx_files import checksum_of
from exporter.progress import NullProgress
from exporter.runtime import OnnxSession
from exporter.targets import get_target

BLOCK = "transformer_blocks.1"
LAYER = f"{BLOCK}.ff.net.2"
TARGET = "rtx-sm89"
Sabotage = Callable[[onnx.ModelProto], None]

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed (extra: rtx)"
)


@pytest.fixture(scope="module")
def plan(tiny_job: Path, tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the tiny model, calibrated already."""
    output = tmp_path_factory.mktemp("engine") / "tiny.plan"
    shutil.copytree(tiny_export.with_name("tiny.work"), output.with_suffix(".work"))
    assert main([str(tiny_job / "tiny.yaml"), "-o", str(output), "--target", TARGET, "--quiet"]) == 0
    return output


@pytest.fixture(scope="module")
def boundaries(plan: Path) -> DeviceRun:
    """What the command leaves for the device when it is run without a GPU."""
    assert main(["bisect", str(plan), "--quiet"]) == 3
    return DeviceRun(plan.with_suffix(".bisect"), "boundaries", get_target(TARGET))


def nothing(_model: onnx.ModelProto) -> None:
    """The device is right."""


def scale_a_layer(model: onnx.ModelProto) -> None:
    """A factor of two in every place where the layer is quantized."""
    (tensor,) = (one for one in model.graph.initializer if one.name == f"{LAYER}.row_scales")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(2), tensor.name))


def scale_the_block(model: onnx.ModelProto) -> None:
    """10 % in the residual stream behind the block's linears."""
    multiply(model, [f"{BLOCK}.output"], 1.1)
    multiply(model, [value.name for value in model.graph.output if ".in_fp32" in value.name], 1.1)


def break_the_block(model: onnx.ModelProto) -> None:
    multiply(model, [f"{BLOCK}.output"], float("nan"))


def multiply(model: onnx.ModelProto, names: Sequence[str], factor: float) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.float32(factor), f"factor.{names[:1]}"))
    for name in names:
        index, maker = next((i, node) for i, node in enumerate(model.graph.node) if name in node.output)
        maker.output[list(maker.output).index(name)] = f"{name}.right"
        model.graph.node.insert(
            index + 1, helper.make_node("Mul", [f"{name}.right", f"factor.{names[:1]}"], [name], f"{name}.wrong")
        )


def record(run: DeviceRun, sabotage: Sabotage, output: Path) -> Path:
    """What the device would leave if its engine had this defect."""
    model = onnx.load(run.file(".onnx"))
    sabotage(model)
    session = OnnxSession(model)
    return save(run, [session.run(feed) for feed in load_feeds(run.file(".inputs.json"))], output)


def save(run: DeviceRun, outputs: Sequence[Arrays], path: Path) -> Path:
    """With the checksums that the script's last line writes."""
    (results := RunResults()).add([dict(output) for output in outputs], runner_name="trt-runner-N0")
    results.save(str(path))
    last = run.script.read_text().splitlines()[-1].replace(run.outputs.stem, path.stem)
    subprocess.run(["sh", "-c", last], check=True, cwd=path.parent)
    return path


@needs_rtx
@pytest.mark.slow
def test_without_its_gpu_an_engine_with_boundaries_is_built_and_the_next_step_told(
    plan: Path, boundaries: DeviceRun, capsys: pytest.CaptureFixture[str]
) -> None:
    check_rtx_engine(boundaries.file(".plan"))
    lowered = plan.with_suffix(".work") / f"lowered.{TARGET}.onnx"
    assert main(["bisect", str(lowered), "--engine", "--quiet"]) == 3
    told = capsys.readouterr().err
    folder = lowered.with_suffix(".bisect")
    assert f"sh {folder}/boundaries.sh" in told
    assert f"fp4export bisect {lowered} --engine --against {folder}/boundaries.outputs.json" in told
    ours, theirs = (onnx.load(run) for run in (boundaries.file(".onnx"), folder / "boundaries.onnx"))
    assert ours == theirs
    shown = {value.name for value in ours.graph.output}
    assert shown >= {"sample", "transformer_blocks.0.input", "transformer_blocks.0.output", f"{BLOCK}.output"}


@needs_rtx
@pytest.mark.slow
def test_a_right_engine_is_clean(plan: Path, boundaries: DeviceRun, tmp_path: Path) -> None:
    found = bisect_engine(plan, [record(boundaries, nothing, tmp_path / "right.json")])
    assert found.clean
    assert (found.place, found.layers, found.notes, found.free.first) == ("", None, (), "")
    assert {row.kind for row in found.blocks} == {"stem", "block", "tail"}


@needs_rtx
@pytest.mark.slow
def test_a_wrong_layer_is_found_in_two_rounds(
    plan: Path, boundaries: DeviceRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = record(boundaries, scale_a_layer, tmp_path / "boundaries.json")
    command = ["bisect", str(plan), "--against", str(first)]
    assert main(command) == 4
    text = capsys.readouterr().out
    layers = DeviceRun(boundaries.folder, "layers", boundaries.target)
    check_rtx_engine(layers.file(".plan"))
    assert f"found: block {BLOCK} deviates" in text
    assert f"--against {first} --against {layers.outputs}" in text
    second = record(layers, scale_a_layer, tmp_path / "layers.json")
    assert main([*command, "--against", str(second)]) == 4
    text = capsys.readouterr().out
    assert text.rstrip().endswith(f"right with {LAYER} in FP32")
    assert f'layers:\n  - {{match: "{LAYER}", weight: none}}' in text
    assert main([*command, "--against", str(second), "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert (document["place"], document["guilty_linears"]) == (BLOCK, [LAYER])
    alone, healed = (row["snr_db"] for row in document["blocks"] if row["kind"] == "block")
    assert healed < document["layers"]["needed_db"] < alone

    between = bisect_engine(plan, [first, record(layers, scale_the_block, tmp_path / "between.json")])
    assert between.layers is not None
    assert (between.layers.reproduced, between.layers.healing) == (True, ())
    assert "lies between them" in between.verdict
    neighbours = bisect_engine(plan, [first, record(layers, nothing, tmp_path / "alone.json")])
    assert neighbours.layers is not None
    assert not neighbours.layers.reproduced
    assert "with its neighbours" in neighbours.verdict


@needs_rtx
@pytest.mark.slow
def test_a_block_is_judged_on_what_the_engine_gave_it(plan: Path, boundaries: DeviceRun, tmp_path: Path) -> None:
    """What follows a wrong block computes rightly from wrong numbers, unless they are none."""
    found = bisect_engine(plan, [record(boundaries, scale_the_block, tmp_path / "wrong.json")], trial=False)
    assert [row.name for row in found.blocks if not row.passed] == [BLOCK]
    assert found.free.first == f"{BLOCK}.output"
    found = bisect_engine(plan, [record(boundaries, break_the_block, tmp_path / "nan.json")], trial=False)
    assert found.place == BLOCK
    assert not found.clean


@needs_rtx
@pytest.mark.slow
def test_recordings_of_something_else_are_refused(plan: Path, boundaries: DeviceRun, tmp_path: Path) -> None:
    right = OnnxSession(boundaries.file(".onnx")).run(load_feeds(boundaries.file(".inputs.json"))[0])
    one = save(boundaries, [right], tmp_path / "one.json")
    with pytest.raises(InputError, match="has outputs of 1 inputs, and 3 were saved"):
        bisect_engine(plan, [one])
    missing = save(boundaries, [{"sample": right["sample"]}] * 3, tmp_path / "missing.json")
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.input is missing, not \["):
        bisect_engine(plan, [missing])
    (tmp_path / "damaged.json").write_text("{")
    for file in (tmp_path / "damaged.json", tmp_path / "absent.json", boundaries.file(".inputs.json")):
        with pytest.raises(InputError, match=file.name):
            bisect_engine(plan, [file])
    checksums = checksums_path(one)
    checksums.write_text(checksums.read_text().replace("graph ", "graph 0"))
    with pytest.raises(InputError, match=r"one\.json: was recorded of another export"):
        bisect_engine(plan, [one])
    one.write_text(one.read_text() + " ")
    with pytest.raises(InputError, match=r"one\.json: is not what the device recorded"):
        bisect_engine(plan, [one])
    checksums.write_text("graph\n")
    with pytest.raises(InputError, match=r"one\.sha256: not the checksums"):
        bisect_engine(plan, [one])
    with pytest.raises(InputError, match=r"absent\.plan: no such file"):
        bisect_engine(tmp_path / "absent.plan")
    with pytest.raises(InputError, match="one of 3 recordings"):
        bisect_engine(plan, [one] * 3)
    with pytest.raises(InputError, match="no engine is made of it"):
        bisect_engine(plan.with_suffix(".work") / f"exported.{TARGET}.onnx")


@needs_rtx
@pytest.mark.slow
def test_what_a_device_left_is_not_lost(plan: Path, boundaries: DeviceRun) -> None:
    boundaries.outputs.write_text("copied back")
    engine = boundaries.file(".plan").read_bytes()
    with pytest.raises(InputError, match=r"boundaries\.outputs\.json: is there already; go on with it \(add "):
        bisect_engine(plan)
    assert boundaries.outputs.read_text() == "copied back"
    assert boundaries.file(".plan").read_bytes() == engine
    boundaries.outputs.unlink()


@needs_rtx
@pytest.mark.slow
def test_where_the_gpu_is_one_command_does_it(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """polygraphy, which the script calls, is a stand-in that runs the graph that the engine was built of."""
    lines = (
        f"#!{sys.executable}",
        "import sys",
        "from onnxruntime import InferenceSession",
        "from polygraphy.comparator import RunResults",
        "from polygraphy.json import load_json",
        "assert sys.argv[1:3] == ['run', 'boundaries.plan']",
        "session, results = InferenceSession('boundaries.onnx'), RunResults()",
        "names = [value.name for value in session.get_outputs()]",
        "outputs = [dict(zip(names, session.run(names, feed))) for feed in load_json('boundaries.inputs.json')]",
        "results.add(outputs, runner_name='trt-runner-N0')",
        "results.save(sys.argv[-1])",
    )
    stand_in = tmp_path / "polygraphy"
    stand_in.write_text("\n".join(lines))
    stand_in.chmod(0o755)
    monkeypatch.setattr(device_run, "local_gpu", lambda: Gpu("a stand-in", (8, 9)))
    monkeypatch.setattr(device_run, "sys", SimpleNamespace(executable=str(tmp_path / "python")))
    found = bisect_engine(plan)
    assert found.clean
    assert not list(plan.with_suffix(".bisect").glob("boundaries.outputs.*")), "the next run makes them again"


def test_the_script_builds_on_the_device_what_is_not_built_here(tmp_path: Path) -> None:
    run = DeviceRun(tmp_path / "a b", "layers", get_target("b200"))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    lowered, kernels = tmp_path / "lowered.onnx", tmp_path / "lowered.kernels"
    lowered.write_bytes(b"")
    kernels.mkdir()
    (kernels / "index.json").write_text("{}")
    feed: Arrays = {"x": np.ones(1, np.float32), "other": np.ones(1, np.float32)}
    run.prepare(helper.make_model(graph), [feed], lowered, NullProgress())
    assert not run.runs_here
    assert (run.folder / "layers.kernels" / "index.json").is_file()
    assert [sorted(one) for one in load_feeds(run.file(".inputs.json"))] == [["x"]]
    said = tmp_path / "said"
    for name in ("fp4export", "polygraphy"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {said}\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with (tmp_path / "polygraphy").open("a") as stand_in:
        stand_in.write("set -C; echo '{}' > layers.outputs.json\n")
    for left_by_another_run in (run.file(".plan"), run.outputs):
        left_by_another_run.write_text("of another graph")
    subprocess.run(["sh", str(run.script)], check=True, env=environment, cwd="/")
    check_recording(run.outputs, checksum_of(lowered))
    build, infer = said.read_text().splitlines()
    assert build == "fp4export build layers.onnx -o layers.plan --target b200 --no-acceptance"
    assert infer.startswith("polygraphy run layers.plan --trt --model-type engine --load-inputs layers.inputs.json ")
    assert infer.endswith("--save-outputs layers.outputs.json")


def test_boundaries_of_other_types_come_out_as_fp32() -> None:
    half, single = (helper.make_tensor_value_info(name, kind, [2]) for name, kind in (("h", 10), ("y", 1)))
    nodes = [helper.make_node("Cast", ["x"], ["h"], to=10), helper.make_node("Cast", ["h"], ["y"], to=1)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [single], value_info=[half]),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 21)],
    )
    shown = with_boundaries(model, ["h", "y"])
    found = OnnxSession(shown).run({"x": np.array([1, 1 + 2**-12], np.float32)})
    assert {boundary_of(name): array.tolist() for name, array in found.items()} == {"h": [1, 1], "y": [1, 1]}
    assert len(model.graph.output) == 1
    with pytest.raises(InputError, match="no tensor 'z' of a known type"):
        with_boundaries(model, ["z"])
