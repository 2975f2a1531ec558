"""Files are whole or absent."""

import errno
import hashlib
from pathlib import Path

import pytest

from exporter.errors import InputError
from exporter.files import atomic_path, remove_leftovers, scratch_folder, sha256_of, write_text_atomically


def test_the_file_appears_only_when_the_body_is_done(tmp_path: Path) -> None:
    final = tmp_path / "model.onnx"
    with atomic_path(final) as temporary:
        temporary.write_bytes(b"whole")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".onnx"
        assert not final.exists()
    assert final.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_an_interrupted_body_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    final = tmp_path / "out.txt"
    final.write_text("old")

    def interrupted() -> None:
        with atomic_path(final) as temporary:
            temporary.write_text("half of")
            raise interruption

    with pytest.raises(interruption):
        interrupted()
    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_a_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"mkdir -p {tmp_path / 'absent'}"):
        write_text_atomically(tmp_path / "absent" / "out.txt", "text")


def test_a_full_disk_names_the_final_path(tmp_path: Path) -> None:
    final = tmp_path / "out.txt"
    with pytest.raises(InputError, match=r"out\.txt: cannot be written: No space left"), atomic_path(final):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_keeps_that_file_s_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"), atomic_path(tmp_path / "out.txt"):
        (tmp_path / "absent.txt").read_text()


def test_a_body_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out\.txt"), atomic_path(tmp_path / "out.txt"):
        pass


def test_sha256_reads_in_pieces(tmp_path: Path) -> None:
    data = b"0123456789" * 300_000
    (tmp_path / "data").write_bytes(data)
    assert sha256_of(tmp_path / "data") == hashlib.sha256(data).hexdigest()


def test_nothing_is_left_of_a_scratch_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), scratch_folder(tmp_path) as folder:
        (folder / "large").with_name("absent").read_text()
    assert list(tmp_path.iterdir()) == []
    with scratch_folder(tmp_path) as folder:
        # As after a run that was killed.
        (folder / "large").write_text("for a while")
        remove_leftovers(tmp_path)
        assert not folder.exists()
