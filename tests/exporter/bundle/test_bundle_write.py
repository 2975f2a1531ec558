"""A bundle appears as a whole, in the place of another bundle or of nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exporter.bundle.read import open_bundle
from exporter.bundle.write import check_place, new_folder, seal
from exporter.errors import InputError
from tests.exporter.bundle.conftest import fill, manifest_of


def write_again(output: Path) -> None:
    with new_folder(output) as folder:
        (folder / "inner").mkdir()
        (folder / "inner").rmdir()
        folder.rmdir()
        fill(folder)
        (folder / "recipe.yaml").write_text("another\n")
        seal(folder, manifest_of(folder))


def write_half(output: Path) -> None:
    with new_folder(output) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt


def test_a_bundle_is_replaced_as_a_whole(bundle_folder: Path) -> None:
    write_again(bundle_folder)
    open_bundle(bundle_folder)
    assert (bundle_folder / "recipe.yaml").read_text() == "another\n"
    assert os.listdir(bundle_folder.parent) == [bundle_folder.name]


def test_an_error_on_the_way_leaves_the_old_one_and_nothing_else(bundle_folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(bundle_folder)
    open_bundle(bundle_folder)
    assert os.listdir(bundle_folder.parent) == [bundle_folder.name]


def test_a_rename_that_fails_puts_the_old_one_back(bundle_folder: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(bundle_folder) as folder:
        folder.rmdir()
    open_bundle(bundle_folder)
    assert os.listdir(bundle_folder.parent) == [bundle_folder.name]


def test_other_peoples_files_are_not_replaced(bundle_folder: Path, tmp_path: Path) -> None:
    engine = bundle_folder / "engine.plan"
    engine.write_bytes(b"built here")
    with pytest.raises(InputError, match=r"holds what is not part of it: engine\.plan"):
        check_place(bundle_folder)
    other = tmp_path / "other.bundle"
    other.mkdir()
    check_place(other)
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is a folder and no bundle"):
        check_place(other)
    with pytest.raises(InputError, match="is a folder and no bundle"):
        write_again(other)
    assert os.listdir(other) == ["thesis.txt"]
    link = tmp_path / "link.bundle"
    link.symlink_to(bundle_folder)
    with pytest.raises(InputError, match="is a link"):
        check_place(link)
    with pytest.raises(InputError, match="is a file"):
        check_place(engine)
    with pytest.raises(InputError, match="mkdir -p"):
        check_place(tmp_path / "absent" / "x.bundle")
