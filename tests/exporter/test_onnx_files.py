"""ONNX files in one piece and in two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.errors import InputError
from exporter.files import sha256_of
from exporter.onnx_files import checksum_of, data_path, read_model, save_onnx, total_bytes, with_values
from tests.exporter.onnx_input.models import matmul_and_add


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    model = matmul_and_add()
    path = tmp_path / "m.onnx"
    save_onnx(model, path)
    assert onnx.load(path) == model
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert total_bytes(path) == path.stat().st_size


def test_a_large_model_s_weights_go_beside_it_and_come_back(tmp_path: Path) -> None:
    model = matmul_and_add()
    model.metadata_props.add(key="author", value="someone")
    before = model.SerializeToString(deterministic=True)
    path = tmp_path / "m.onnx"
    save_onnx(model, path, largest=100)
    assert model.SerializeToString(deterministic=True) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    onnx.checker.check_model(str(path), full_check=True)
    loaded = onnx.load(path)
    for tensor, other in zip(model.graph.initializer, loaded.graph.initializer, strict=True):
        assert np.array_equal(onnx.numpy_helper.to_array(tensor), onnx.numpy_helper.to_array(other))
    assert loaded.graph.node == model.graph.node
    assert loaded.metadata_props == model.metadata_props
    assert total_bytes(path) == path.stat().st_size + data_path(path).stat().st_size


def test_an_older_data_file_goes_when_the_model_fits_one_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_onnx(matmul_and_add(), path, largest=100)
    save_onnx(matmul_and_add(), path)
    assert not data_path(path).exists()


def test_a_data_file_that_another_model_points_to_stays(tmp_path: Path) -> None:
    save_onnx(matmul_and_add(), tmp_path / "m.onnx", largest=100)
    (tmp_path / "m.onnx").rename(tmp_path / "other.onnx")
    save_onnx(matmul_and_add(), tmp_path / "m.onnx")
    save_onnx(matmul_and_add(), tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "other.onnx").graph.initializer[0].raw_data


@pytest.mark.parametrize("before", [b"no model", b""])
def test_what_is_no_model_is_replaced_and_a_data_file_beside_it_stays(before: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(before)
    data_path(path).write_bytes(b"something")
    save_onnx(matmul_and_add(), path)
    assert onnx.load(path) == matmul_and_add()
    assert data_path(path).read_bytes() == b"something"


def test_a_checksum_covers_the_data_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_onnx(matmul_and_add(), path)
    assert checksum_of(path) == sha256_of(path)
    save_onnx(matmul_and_add(), path, largest=100)
    before = checksum_of(path)
    content = bytearray(data_path(path).read_bytes())
    content[5] ^= 1
    data_path(path).write_bytes(content)
    assert checksum_of(path) != before


def test_missing_folders_and_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the folder does not exist"):
        save_onnx(matmul_and_add(), tmp_path / "absent" / "m.onnx")
    save_onnx(matmul_and_add(), tmp_path / "m.onnx", largest=100)
    data_path(tmp_path / "m.onnx").unlink()
    with pytest.raises(InputError, match=r"m\.onnx\.data: cannot be read"):
        total_bytes(tmp_path / "m.onnx")


@pytest.mark.parametrize("largest", [100, 1 << 20])
def test_weights_that_a_model_lacks_are_read_from_their_folder_when_it_is_saved(largest: int, tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    save_onnx(matmul_and_add(), first / "m.onnx", largest=100)
    light = read_model(first / "m.onnx", external_data=False)
    save_onnx(light, tmp_path / "copy.onnx", largest, folder=first)
    assert data_path(tmp_path / "copy.onnx").is_file() == (largest == 100)
    for tensor, other in zip(
        matmul_and_add().graph.initializer, onnx.load(tmp_path / "copy.onnx").graph.initializer, strict=True
    ):
        assert np.array_equal(onnx.numpy_helper.to_array(tensor), onnx.numpy_helper.to_array(other))


def test_values_come_from_their_file_and_what_has_them_is_not_copied(tmp_path: Path) -> None:
    save_onnx(matmul_and_add(), tmp_path / "m.onnx", largest=100)
    light = read_model(tmp_path / "m.onnx", external_data=False).graph.initializer
    elsewhere = [tensor for tensor in light if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert elsewhere
    for tensor, whole in zip(light, matmul_and_add().graph.initializer, strict=True):
        found = with_values(tensor, tmp_path)
        assert (found is tensor) == (tensor not in elsewhere)
        assert np.array_equal(onnx.numpy_helper.to_array(found), onnx.numpy_helper.to_array(whole))
    data_path(tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"the values of .* cannot be read"):
        with_values(elsewhere[0], tmp_path)
