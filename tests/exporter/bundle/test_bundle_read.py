"""A bundle is opened only when every byte is as it was written, and never leads out of its folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from exporter.bundle.manifest import LARGEST_MANIFEST, MANIFEST
from exporter.bundle.read import open_bundle
from exporter.bundle.write import listed_files
from exporter.errors import InputError
from tests.exporter.bundle.conftest import graph_with_external_data, manifest_of


def test_a_targets_files_are_found_by_name_and_by_gpu(bundle_folder: Path) -> None:
    bundle = open_bundle(bundle_folder)
    files = bundle.target("h100")
    assert files.lowered == bundle_folder / "lowered.h100.onnx"
    assert files.kernels == bundle_folder / "lowered.h100.kernels"
    assert files.acceptance is not None
    assert files.acceptance.inputs.read_text() == "gate/inputs.json\n"
    assert files.acceptance.snr_db == 40.5
    assert bundle.target(compute_capability=(9, 0)).entry.name == "h100"
    assert bundle.target("cpu").kernels is None
    with pytest.raises(InputError, match="did you mean 'h100'"):
        bundle.target("h200")
    with pytest.raises(InputError, match=r"capability 8\.7, only for h100, cpu"):
        bundle.target(compute_capability=(8, 7))
    with pytest.raises(InputError, match="choose with --target: h100, cpu"):
        bundle.target()


def every_file(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_one_changed_byte_in_any_file_is_found_and_the_file_is_named(bundle_folder: Path) -> None:
    files = every_file(bundle_folder)
    assert len(files) == 11
    for file in files:
        original = file.read_bytes()
        for place in {0, len(original) // 2, len(original) - 1}:
            changed = bytearray(original)
            changed[place] ^= 1
            file.write_bytes(changed)
            with pytest.raises(InputError, match=file.name):
                open_bundle(bundle_folder)
        file.write_bytes(original)
    open_bundle(bundle_folder)


def test_every_byte_of_the_manifest_counts(bundle_folder: Path) -> None:
    file = bundle_folder / MANIFEST
    original = file.read_bytes()
    for place in range(0, len(original), 7):
        changed = bytearray(original)
        changed[place] ^= 2
        file.write_bytes(changed)
        with pytest.raises(InputError, match=MANIFEST):
            open_bundle(bundle_folder)


def test_missing_and_extra_files_are_named(bundle_folder: Path) -> None:
    extra = bundle_folder / "gate" / "more.json"
    extra.write_text("")
    with pytest.raises(InputError, match=r"not part of the bundle: gate/more\.json"):
        open_bundle(bundle_folder)
    extra.unlink()
    (bundle_folder / "empty").mkdir()
    with pytest.raises(InputError, match="not part of the bundle: empty/"):
        open_bundle(bundle_folder)
    (bundle_folder / "empty").rmdir()
    (bundle_folder / "lowered.h100.kernels" / "k.ptx").unlink()
    with pytest.raises(InputError, match=r"missing: lowered\.h100\.kernels/k\.ptx"):
        open_bundle(bundle_folder)


def a_link(path: Path) -> None:
    content = path.parent / "moved"
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / "elsewhere")
    assert not content.exists()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(("change", "words"), [(a_link, "symbolic link"), (a_pipe, "neither a file nor a folder")])
@pytest.mark.parametrize("name", ["weights.data", "recipe.yaml"])
def test_links_and_pipes_are_never_opened(
    bundle_folder: Path, change: Callable[[Path], None], words: str, name: str
) -> None:
    change(bundle_folder / name)
    with pytest.raises(InputError, match=rf"{name}: is .*{words}"):
        open_bundle(bundle_folder)


def test_a_linked_folder_and_a_linked_manifest_are_refused(bundle_folder: Path, tmp_path: Path) -> None:
    (bundle_folder / "gate").rename(tmp_path / "gate")
    (bundle_folder / "gate").symlink_to(tmp_path / "gate")
    with pytest.raises(InputError, match="gate: is a symbolic link"):
        open_bundle(bundle_folder)
    (bundle_folder / MANIFEST).rename(tmp_path / MANIFEST)
    (bundle_folder / MANIFEST).symlink_to(tmp_path / MANIFEST)
    with pytest.raises(InputError, match="no bundle"):
        open_bundle(bundle_folder)


def test_what_is_no_bundle_is_refused(bundle_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_bundle(tmp_path / "absent.bundle")
    with pytest.raises(InputError, match="is a file"):
        open_bundle(bundle_folder / MANIFEST)
    (bundle_folder / MANIFEST).write_bytes(b"{" + b" " * LARGEST_MANIFEST + b"}")
    with pytest.raises(InputError, match="over 4 MiB"):
        open_bundle(bundle_folder)


def rewrite(folder: Path, name: str, model: onnx.ModelProto) -> None:
    """An attacker's bundle: the manifest agrees with every file."""
    onnx.save(model, folder / name)
    changed = replace(manifest_of(folder), files=listed_files(folder))
    (folder / MANIFEST).write_text(changed.to_json())


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("../secret.data", "leads out of the bundle"),
        ("/etc/passwd", "leads out of the bundle"),
        ("gate/../../secret.data", "leads out of the bundle"),
        ("./weights.data", "not a plain relative path"),
        ("C:weights.data", "not a plain relative path"),
        ("other.data", "no file of the bundle"),
        (MANIFEST, "no file of the bundle"),
    ],
)
def test_external_data_stays_inside(bundle_folder: Path, location: str, words: str) -> None:
    (bundle_folder.parent / "secret.data").write_bytes(bytes(64))
    rewrite(bundle_folder, "lowered.cpu.onnx", graph_with_external_data(location))
    with pytest.raises(InputError, match=rf"lowered\.cpu\.onnx: weight 'w'.*{words}"):
        open_bundle(bundle_folder)


def in_a_constant_of_a_subgraph(model: onnx.ModelProto) -> onnx.ModelProto:
    (tensor,) = model.graph.initializer
    constant = onnx.helper.make_node("Constant", [], ["w"], value=tensor)
    branch = onnx.helper.make_graph([constant], "b", [], [onnx.ValueInfoProto(name="w")])
    model.graph.node.insert(0, onnx.helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch))
    del model.graph.initializer[:]
    return model


def in_a_function(model: onnx.ModelProto) -> onnx.ModelProto:
    (tensor,) = model.graph.initializer
    constant = onnx.helper.make_node("Constant", [], ["w"], value=tensor)
    opset = onnx.helper.make_opsetid("", 21)
    model.functions.append(onnx.helper.make_function("fp4export", "F", [], ["w"], [constant], [opset]))
    del model.graph.initializer[:]
    return model


def in_a_sparse_initializer(model: onnx.ModelProto) -> onnx.ModelProto:
    (tensor,) = model.graph.initializer
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    del model.graph.initializer[:]
    return model


@pytest.mark.parametrize("hide", [in_a_constant_of_a_subgraph, in_a_function, in_a_sparse_initializer])
def test_escaping_weights_are_found_wherever_a_graph_can_hold_them(
    bundle_folder: Path, hide: Callable[[onnx.ModelProto], onnx.ModelProto]
) -> None:
    rewrite(bundle_folder, "exported.onnx", hide(graph_with_external_data("../secret.data")))
    with pytest.raises(InputError, match="leads out of the bundle"):
        open_bundle(bundle_folder)
    rewrite(bundle_folder, "exported.onnx", hide(graph_with_external_data("weights.data")))
    open_bundle(bundle_folder)


@pytest.mark.parametrize(("offset", "length"), [(4, 64), (0, 65), (10**12, 0), (-4, 8), ("9" * 5000, 0)])
def test_external_data_lies_within_its_file(bundle_folder: Path, offset: int | str, length: int) -> None:
    rewrite(bundle_folder, "lowered.cpu.onnx", graph_with_external_data("weights.data", offset, length))
    with pytest.raises(InputError, match="beyond the end"):
        open_bundle(bundle_folder)


def test_a_graph_by_another_name_does_not_escape_the_check(bundle_folder: Path) -> None:
    (bundle_folder.parent / "secret.data").write_bytes(bytes(64))
    onnx.save(graph_with_external_data("../secret.data"), bundle_folder / "graph.bin")
    manifest = manifest_of(bundle_folder)
    targets = (replace(manifest.targets[0], lowered="graph.bin"), manifest.targets[1])
    (bundle_folder / MANIFEST).write_text(replace(manifest, targets=targets).to_json())
    with pytest.raises(InputError, match=r"graph\.bin: weight 'w'.*leads out of the bundle"):
        open_bundle(bundle_folder)


def test_a_graph_that_is_none_is_refused(bundle_folder: Path) -> None:
    (bundle_folder / "lowered.cpu.onnx").write_bytes(b"\xff\xff\xff")
    (bundle_folder / MANIFEST).write_text(manifest_of(bundle_folder).to_json())
    with pytest.raises(InputError, match=r"lowered\.cpu\.onnx: not an ONNX file"):
        open_bundle(bundle_folder)


def test_opening_writes_nothing_and_needs_no_more_than_a_device_has(bundle_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle_folder.parent.rglob("*")}
    program = f"""
import sys
from exporter.bundle.read import open_bundle
print(open_bundle({str(bundle_folder)!r}).target("h100").lowered.name)
absent = ("torch", "onnxruntime", "onnx_graphsurgeon", "safetensors", "pydantic", "yaml", "rich", "click", "diffusers")
print(sorted(set(absent) & set(sys.modules)))
"""
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.splitlines() == ["lowered.h100.onnx", "[]"]
    assert {path: path.stat().st_mtime_ns for path in bundle_folder.parent.rglob("*")} == before
