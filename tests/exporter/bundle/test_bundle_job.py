"""The main job with a bundle as its output, from the command line, on a tiny random PixArt."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from exporter.bundle.job import choose_targets
from exporter.bundle.manifest import MANIFEST
from exporter.bundle.read import open_bundle
from exporter.bundle.write import listed_files
from exporter.cli import main
from exporter.device.acceptance import MOST_ASKED_DB, find_acceptance
from exporter.errors import InputError
from plugins.kernels.library import KernelLibrary
from plugins.tensorrt_plugins.registration import plugin_op_types

WORDS = ["--target", "orin,cpu", "--quiet"]

PLUGINS = """
model: {weights: model}
preset: w4a6
kernels: plugin
layers:
  - {match: "transformer_blocks.0.ff.net.2", group: 128}
  - {match: "*", weight: none}
calibration: {prompts: prompts.safetensors, steps: 3, samples: 2}
method: {name: rtn}
"""


@pytest.fixture(scope="module")
def bundle(tiny_job: Path, begin: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for two targets, in whose work folder an export with plugins left its kernels."""
    folder = tmp_path_factory.mktemp("bundle")
    job = shutil.copytree(tiny_job, folder / "job", ignore=shutil.ignore_patterns("tiny.*work", "*.onnx"))
    (job / "model" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    output = folder / "tiny.bundle"
    left = begin(folder / "tiny.work") / "lowered.orin.kernels"
    left.mkdir()
    (left / "kernels.json").write_text("{}\n")
    assert main([str(job / "tiny.yaml"), "-o", str(output), *WORDS]) == 0
    return output


@pytest.mark.slow
def test_it_holds_all_that_a_device_needs(bundle: Path) -> None:
    opened = open_bundle(bundle)
    orin, cpu = opened.target("orin"), opened.target("cpu")
    assert (orin.kernels, cpu.kernels) == (None, None)
    assert not list(bundle.glob("*.kernels"))
    for files in (orin, cpu):
        assert files.acceptance is not None
        found = find_acceptance(files.lowered.parent / f"gate.{files.entry.name}")
        assert found is not None
        assert (found.inputs, found.outputs) == (files.acceptance.inputs, files.acceptance.reference)
        assert 0 <= found.least_db - min(files.acceptance.snr_db, MOST_ASKED_DB) <= 0.1
        assert onnx.load(files.exported).graph.node
        assert onnx.load(files.lowered).graph.node
    assert opened.manifest.weights.licence == "cc-by-4.0"
    assert "diffusion_pytorch_model.safetensors" in opened.manifest.weights.sha256
    readme = (bundle / "README.md").read_text()
    assert "fp4export build tiny.bundle --target orin -o orin.plan" in readme
    assert "cc-by-4.0" in readme
    everything = b"".join(path.read_bytes() for path in bundle.rglob("*") if path.is_file())
    assert str(bundle.parent).encode() not in everything


@pytest.mark.slow
def test_begun_anew_every_target_s_files_are_made_once(tiny_job: Path, tmp_path: Path) -> None:
    command = [str(tiny_job / "tiny.yaml"), "-o", str(tmp_path / "x.bundle"), "--target", "rtx-sm89,cpu", "--quiet"]
    command += ["--no-validate", "--set", "method.name=rtn", "--set", "preset=w4a8"]
    made = []
    for word in ("--resume", "--fresh", "--resume"):
        assert main([*command, word]) == 0
        made.append({path: path.stat().st_mtime_ns for path in (tmp_path / "x.work").glob("*.seal")})
    names = [path.name.partition(".")[0] for path in made[0]]
    assert (names.count("calibration"), names.count("quantized")) == (1, 2)
    assert made[0].keys() == made[1].keys()
    assert not made[0].items() & made[1].items()
    assert made[1] == made[2]


@pytest.mark.slow
def test_plugins_go_to_the_targets_that_run_them(tiny_job: Path, tmp_path: Path) -> None:
    recipe = tiny_job / "plugins.yaml"
    recipe.write_text(PLUGINS)
    output = tmp_path / "plugins.bundle"
    assert main([str(recipe), "-o", str(output), "--target", "orin,cpu", "--quiet"]) == 0
    opened = open_bundle(output)
    orin, cpu = opened.target("orin"), opened.target("cpu")
    assert orin.kernels is not None
    assert cpu.kernels is None
    operators = plugin_op_types(onnx.load(orin.lowered))
    library = KernelLibrary.load(orin.kernels)
    assert {kernel.op_type for kernel in library.kernels} == set(operators) != set()
    assert library.capabilities == ((8, 7),)
    assert {path.suffix for path in orin.kernels.iterdir()} == {".ptx", ".json"}
    assert plugin_op_types(onnx.load(cpu.lowered)) == ()
    assert "Its plugins need TensorRT ≥ 10.9" in (output / "README.md").read_text(encoding="utf-8")
    assert main(["validate", str(output), "--quiet"]) == 0
    ptx = next(orin.kernels.glob("*.ptx"))
    ptx.write_text(ptx.read_text().replace("8", "9", 1))
    with pytest.raises(InputError, match=ptx.name):
        open_bundle(output)


def test_plugins_that_no_target_runs_are_refused(
    tiny_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_job / "tiny.yaml"), "-o", str(tmp_path / "x.bundle"), "--set", "kernels=plugin", "--dry-run"]
    assert main([*words, "--target", "cpu,rtx-sm89"]) == 2
    assert "takes `kernels: native` only" in capsys.readouterr().err
    assert main([*words, "--target", "cpu,h100"]) == 0
    assert "cpu (as asked for; native kernels, since it runs no plugins)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_readmes_own_check_passes_as_it_is_written(bundle: Path) -> None:
    lines = (bundle / "README.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("polygraphy") and "--onnxrt" in line)
    command = [str(Path(sys.executable).with_name("polygraphy")), *shlex.split(line)[1:]]
    result = subprocess.run(command, capture_output=True, text=True, cwd=bundle.parent, check=False)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "PASSED" in result.stdout


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes_and_replace_the_bundle(bundle: Path) -> None:
    before = {path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert main([str(bundle.parent / "job" / "tiny.yaml"), "-o", str(bundle), *WORDS]) == 0
    after = {path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert after == before
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["job", "tiny.bundle", "tiny.work"]


@pytest.mark.slow
def test_inspect_and_validate_take_it(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    text = capsys.readouterr().out
    for fact in ("orin", "tensorrt", "onnxruntime", "cc-by-4.0 (stated in README.md)", "lowered.cpu.onnx"):
        assert fact in text
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["targets"][0]["compute_capability"] == [8, 7]
    assert main(["validate", str(bundle)]) == 0
    assert capsys.readouterr().out.count("ok") == 2
    changed = shutil.copytree(bundle, tmp_path / "changed.bundle")
    (changed / "lowered.cpu.onnx").write_bytes(b"")
    assert main(["validate", str(changed)]) == 2
    assert "lowered.cpu.onnx" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wrong_graph_in_a_right_bundle_does_not_pass(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    changed = shutil.copytree(bundle, tmp_path / "changed.bundle")
    path = changed / "lowered.cpu.onnx"
    model = onnx.load(path)
    (tensor,) = (one for one in model.graph.initializer if one.name == "transformer_blocks.0.ff.net.2.row_scales")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, tensor.name))
    onnx.save(model, path)
    manifest = replace(open_bundle(bundle).manifest, files=listed_files(changed))
    (changed / MANIFEST).write_text(manifest.to_json())
    assert main(["validate", str(changed)]) == 4
    assert "target cpu: SNR" in capsys.readouterr().err


@pytest.mark.slow
def test_the_devices_program_takes_the_graph_for_its_target_out_of_it(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "engine.plan"
    for words, message in (
        ([str(bundle), "-o", str(output)], "holds several targets; choose with --target: orin, cpu"),
        ([str(bundle), "-o", str(output), "--target", "h100"], "has nothing for target 'h100'"),
        ([str(bundle), "-o", str(output), "--target", "cpu"], "target cpu"),
        ([str(bundle), "-o", str(bundle / "engine.plan"), "--target", "orin"], "is inside the bundle"),
        ([str(tmp_path / "absent.bundle"), "-o", str(output)], "no such folder"),
    ):
        assert main(["build", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["build", str(bundle), "-o", str(output), "--target", "orin"]) == 3
    assert str(bundle / "lowered.orin.onnx") in capsys.readouterr().err


def test_targets_are_a_list_without_doubles() -> None:
    assert [choice.target.name for choice in choose_targets("h100, orin,cpu")] == ["h100", "orin", "cpu"]
    with pytest.raises(InputError, match="did you mean 'h100'"):
        choose_targets("h1000")
    with pytest.raises(InputError, match="twice"):
        choose_targets("h100,h100")


def test_wrong_words_are_bad_input(tiny_job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(tiny_job / "tiny.yaml")
    (tmp_path / "taken.bundle").write_text("")
    for words, message in (
        (["-o", str(tmp_path / "x.plan"), "--target", "h100,orin"], "several go into a bundle"),
        (["-o", str(tmp_path / "x.bundle"), "--target", "h100,h100"], "twice"),
        (["-o", str(tmp_path / "no" / "x.bundle"), "--target", "cpu"], "mkdir -p"),
        (["-o", str(tmp_path / "taken.bundle"), "--target", "cpu"], "is a file"),
    ):
        assert main([recipe, *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken.bundle"]
    assert main([recipe, "-o", str(tmp_path / "x.bundle"), "--target", "h100,cpu", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "h100 (as asked for)" in text
    assert "cpu (as asked for)" in text


def test_several_processes_are_refused(
    tiny_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([str(tiny_job / "tiny.yaml"), "-o", str(tmp_path / "x.bundle"), "--target", "cpu"]) == 2
    assert "x.bundle: 2 processes cannot make a bundle together: start fp4export without" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
