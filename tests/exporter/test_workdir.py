"""The work folder reuses what is whole and current, and redoes everything else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from exporter.errors import EnvironmentLacksError, InputError
from exporter.workdir import WorkDir, key_of


def writer(text: str, calls: list[str]):
    def make(path: Path) -> None:
        calls.append(text)
        path.write_text(text)

    return make


def test_second_run_with_the_same_key_reuses_the_file(tmp_path: Path) -> None:
    work = WorkDir.open(tmp_path / "w")
    calls: list[str] = []
    path, reused = work.obtain("a.txt", key_of(seed=1), writer("one", calls))
    again, reused_again = work.obtain("a.txt", key_of(seed=1), writer("two", calls))
    assert (reused, reused_again) == (False, True)
    assert calls == ["one"]
    assert path == again
    assert again.read_text() == "one"


@pytest.mark.parametrize("damage", ["key", "content", "seal", "missing", "fresh"])
def test_what_is_outdated_or_damaged_is_made_again(tmp_path: Path, damage: str) -> None:
    work = WorkDir.open(tmp_path / "w")
    calls: list[str] = []
    path, _ = work.obtain("a.txt", key_of(seed=1), writer("one", calls))
    key = key_of(seed=2) if damage == "key" else key_of(seed=1)
    if damage == "content":
        path.write_text("onE")
    elif damage == "seal":
        (tmp_path / "w" / "a.txt.seal").write_text("{")
    elif damage == "missing":
        path.unlink()
    elif damage == "fresh":
        work = WorkDir.open(tmp_path / "w", fresh=True)
    _, reused = work.obtain("a.txt", key, writer("two", calls))
    assert not reused
    assert path.read_text() == "two"


def test_what_a_fresh_run_has_made_it_does_not_make_again(tmp_path: Path) -> None:
    WorkDir.open(tmp_path / "w").obtain("a.txt", key_of(seed=1), writer("one", []))
    work, calls = WorkDir.open(tmp_path / "w", fresh=True), list[str]()
    reused = [work.obtain("a.txt", key_of(seed=1), writer("two", calls))[1] for _ in range(3)]
    assert reused == [False, True, True]
    assert calls == ["two"]


def test_an_interrupted_stage_leaves_the_earlier_file_and_no_rubbish(tmp_path: Path) -> None:
    work = WorkDir.open(tmp_path / "w")
    path, _ = work.obtain("a.txt", key_of(seed=1), writer("one", []))

    def interrupted(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.obtain("a.txt", key_of(seed=2), interrupted)
    assert path.read_text() == "one"
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.txt", "a.txt.seal"]


def test_a_folder_that_is_being_worked_in_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    first, second = (WorkDir.open(tmp_path / "w") for _ in range(2))
    with first.locked():
        with pytest.raises(InputError, match=f"process {os.getpid()} on .*--work-dir") as caught, second.locked():
            pass
        assert "\n" not in str(caught.value)
    with second.locked():
        pass


def test_a_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    work = WorkDir.open(tmp_path / "w")
    with pytest.raises(EnvironmentLacksError, match=r"has no file locks .*export on Linux or macOS"), work.locked():
        pass


def test_what_a_killed_run_was_writing_is_removed_and_nothing_else(tmp_path: Path) -> None:
    work = WorkDir.open(tmp_path / "w")
    kept = ["a.onnx", ".hidden", ".a.tmp.onnx", "gate.cpu/reference.safetensors"]
    half = [".a.0123abcd.tmp.onnx", ".a.0123abcd.tmp.onnx.data", "gate.cpu/.r.89abcdef.tmp", ".k.89abcdef.tmp/k.ptx"]
    for name in (*kept, *half):
        work.file(name).parent.mkdir(exist_ok=True)
        work.file(name).write_text("")
    with work.locked():
        left = {path.relative_to(work.path).as_posix() for path in work.path.rglob("*") if path.is_file()}
    assert left == {*kept, "lock"}


def test_key_depends_on_names_values_and_nothing_else() -> None:
    assert key_of(a=1, b=[2, 3]) == key_of(b=[2, 3], a=1)
    assert len({key_of(a=1), key_of(a=2), key_of(b=1), key_of(a="1")}) == 4


def test_writing_into_a_folder_that_vanished_is_an_input_error(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "gone")
    with pytest.raises(InputError, match="does not exist"):
        work.obtain("a.txt", key_of(seed=1), writer("one", []))
