"""A folder of kernels is whole or not there, and every byte of it is checked."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from plugins.kernels.library import INDEX, KernelLibrary, KernelLibraryError, _canonical, _sha256, kernels_folder


@pytest.fixture
def folder(library: KernelLibrary, tmp_path: Path) -> Path:
    library.save(tmp_path / "model.kernels")
    return tmp_path / "model.kernels"


def test_what_is_saved_is_loaded(library: KernelLibrary, folder: Path) -> None:
    assert KernelLibrary.load(folder) == library
    assert [path.name for path in folder.parent.iterdir()] == ["model.kernels"]
    names = {path.name for path in folder.iterdir()}
    assert names == {INDEX} | {f"{kernel.entry}.ptx" for kernel in library.kernels}


def test_the_same_kernels_give_the_same_bytes(library: KernelLibrary, folder: Path) -> None:
    first = (folder / INDEX).read_bytes()
    library.save(folder)
    assert (folder / INDEX).read_bytes() == first


def test_saving_replaces_a_library_and_nothing_else(library: KernelLibrary, folder: Path, tmp_path: Path) -> None:
    one = KernelLibrary(library.kernels[:1], library.compiler)
    one.save(folder)
    assert KernelLibrary.load(folder) == one
    assert len(list(folder.iterdir())) == 2
    (tmp_path / "empty").mkdir()
    one.save(tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / "file").touch()
    for name in ("photos", "file"):
        with pytest.raises(KernelLibraryError, match="no folder of kernels; remove it"):
            one.save(tmp_path / name)
    assert (tmp_path / "photos" / "cat.jpg").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "model.kernels", "photos"]


def test_a_write_that_fails_leaves_the_old_library(
    library: KernelLibrary, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(KernelLibraryError, match="cannot be written: No space left on device"):
        library.save(folder)
    assert KernelLibrary.load(folder) == library
    assert [path.name for path in folder.parent.iterdir()] == ["model.kernels"]


def test_reading_needs_no_compiler(folder: Path) -> None:
    program = """
import sys
from plugins.kernels.library import KernelLibrary
library = KernelLibrary.load(sys.argv[1])
print(len(library.kernels), sorted({"triton", "torch", "onnxruntime"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "16 []"


def test_a_changed_byte_is_an_error(library: KernelLibrary, folder: Path) -> None:
    for path in (folder / f"{library.kernels[0].entry}.ptx", folder / INDEX):
        whole = path.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 2):
            changed = bytearray(whole)
            changed[position] ^= 1
            path.write_bytes(changed)
            with pytest.raises(KernelLibraryError, match=path.name):
                KernelLibrary.load(folder)
        path.write_bytes(whole[:-10])
        with pytest.raises(KernelLibraryError, match=path.name):
            KernelLibrary.load(folder)
        path.write_bytes(whole)
    assert KernelLibrary.load(folder) == library


def test_what_is_missing_is_named(library: KernelLibrary, folder: Path) -> None:
    name = f"{library.kernels[3].entry}.ptx"
    (folder / name).unlink()
    with pytest.raises(KernelLibraryError, match=f"{name}: cannot be read: No such file"):
        KernelLibrary.load(folder)
    with pytest.raises(KernelLibraryError, match=r"absent.kernels/kernels.json: not there; copy the folder"):
        KernelLibrary.load(folder.parent / "absent.kernels")


@pytest.mark.parametrize("document", ["", "[]", "{}", "null", "\xff", '{"format_version": 1}', "[" * 100_000])
def test_files_that_are_no_index(folder: Path, document: str) -> None:
    (folder / INDEX).write_text(document, encoding="latin-1")
    with pytest.raises(KernelLibraryError, match=INDEX):
        KernelLibrary.load(folder)


def test_other_versions_are_refused(folder: Path) -> None:
    document = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(document | {"format_version": 2}))
    with pytest.raises(KernelLibraryError, match="format version 2, and this fp4export reads 1"):
        KernelLibrary.load(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".."])
def test_names_cannot_lead_out_of_the_folder(library: KernelLibrary, folder: Path, name: str) -> None:
    """Also with a checksum that is right."""
    with pytest.raises(KernelLibraryError, match="cannot name a kernel"):
        KernelLibrary((replace(library.kernels[0], entry=name),), "compiler")
    document = json.loads((folder / INDEX).read_text())
    document["kernels"][0]["entry"] = name
    content = {key: document[key] for key in ("compiler", "kernels")}
    (folder / INDEX).write_text(json.dumps(document | {"sha256": _sha256(_canonical(content))}))
    with pytest.raises(KernelLibraryError, match="cannot name a kernel"):
        KernelLibrary.load(folder)


def test_kernels_are_found_by_operator_and_gpu(library: KernelLibrary) -> None:
    found = library.tactics("ScaleRows_k64", (8, 7))
    assert [kernel.entry for kernel in found] == ["ScaleRows_k64_sm87_t0", "ScaleRows_k64_sm87_t1"]
    assert [kernel.tactic for kernel in found] == [0, 1]
    assert [kernel.launch.programs(9) for kernel in found] == [3, 1]
    with pytest.raises(KernelLibraryError, match=r"no kernel of ScaleRows_k64 for compute capability 7.5 \(there are"):
        library.tactics("ScaleRows_k64", (7, 5))
    with pytest.raises(KernelLibraryError, match=r"no kernel of Absent .*\(there are for: none\)"):
        library.tactics("Absent", (9, 0))


def test_two_kernels_cannot_share_a_name_or_a_place(library: KernelLibrary) -> None:
    first = library.kernels[0]
    with pytest.raises(KernelLibraryError, match="2 kernels are ScaleRows_k64"):
        KernelLibrary((first, replace(first, tactic=5)), "")
    with pytest.raises(KernelLibraryError, match="2 kernels are ScaleRows_k64"):
        KernelLibrary((first, replace(first, entry="other")), "")


def test_the_folder_of_a_model() -> None:
    assert kernels_folder("build/lowered.orin.onnx") == Path("build/lowered.orin.kernels")
