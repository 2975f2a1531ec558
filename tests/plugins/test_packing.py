"""Packing and unpacking, as a pair, in numpy and in ONNX operators."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import helper

from plugins.packing import PACKED_BITS, PackingError, pack, unpack, unpack_nodes, words_per_row

widths = st.sampled_from(PACKED_BITS)


@st.composite
def coded(draw: st.DrawFn, min_dims: int = 1, max_dims: int = 3, min_side: int = 0) -> tuple[np.ndarray, int]:
    bits = draw(widths)
    shape = draw(hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=min_side, max_side=70))
    shape = (*(min(side, 4) for side in shape[:-1]), shape[-1])
    return draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1))), bits


@given(coded())
@settings(deadline=None)
def test_unpack_inverts_pack(case: tuple[np.ndarray, int]) -> None:
    codes, bits = case
    words = pack(codes, bits)
    assert words.dtype == np.int32
    assert words.shape == (*codes.shape[:-1], words_per_row(codes.shape[-1], bits))
    assert np.array_equal(unpack(words, bits, codes.shape[-1]), codes)


@given(coded(max_dims=1))
@settings(deadline=None)
def test_a_row_is_one_little_endian_number(case: tuple[np.ndarray, int]) -> None:
    """The layout, said another way: the words, read as one big integer, hold code i at bit i * bits."""
    codes, bits = case
    stream = sum(int(code) << (bits * position) for position, code in enumerate(codes))
    assert int.from_bytes(pack(codes, bits).astype("<i4").tobytes(), "little") == stream


def test_known_words() -> None:
    assert pack(np.array([1, 2, 3, 4, 5, 6, 7, 8], np.uint8), 4).view(np.uint32).tolist() == [0x87654321]
    assert pack(np.full(16, 63, np.uint8), 6).tolist() == [-1, -1, -1]
    assert pack(np.array([0, 255], np.uint8), 8).tolist() == [0xFF00]


@pytest.mark.parametrize(
    ("count", "bits", "words"), [(0, 4, 0), (1, 4, 1), (9, 4, 2), (16, 6, 3), (17, 6, 4), (5, 8, 2)]
)
def test_words_per_row(count: int, bits: int, words: int) -> None:
    assert words_per_row(count, bits) == words


def test_strided_words_unpack_as_well() -> None:
    codes = np.arange(32, dtype=np.uint8).reshape(2, 16)
    padded = np.repeat(pack(codes, 6), 2, axis=1)
    assert np.array_equal(unpack(padded[:, ::2], 6, 16), codes)


def test_pack_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(PackingError, match="code 16 does not fit 4 bits; largest: 15"):
        pack(np.array([3, 16], np.uint8), 4)
    with pytest.raises(PackingError, match="must be uint8"):
        pack(np.array([3], np.int64), 4)
    with pytest.raises(PackingError, match="5 bits are not packed; valid: 3, 4, 6, 8"):
        pack(np.array([3], np.uint8), 5)
    with pytest.raises(PackingError, match="must be uint8"):
        pack(np.uint8(3), 4)


def test_unpack_refuses_words_of_another_count() -> None:
    with pytest.raises(PackingError, match="17 codes of 6 bits take 4 words, not 3"):
        unpack(np.zeros((2, 3), np.int32), 6, 17)
    with pytest.raises(PackingError, match="must be int32"):
        unpack(np.zeros((2, 3), np.int64), 6, 16)


def unpack_model(bits: int, count: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        unpack_nodes("words", "codes", "layer.unpack_", bits, count),
        "unpack",
        [helper.make_tensor_value_info("words", onnx.TensorProto.INT32, ["n", "words"])],
        [helper.make_tensor_value_info("codes", onnx.TensorProto.INT64, ["n", count])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model


@given(coded(min_dims=2, max_dims=2, min_side=1))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_nodes_unpack_like_numpy(run_model: Callable[..., list[np.ndarray]], case: tuple[np.ndarray, int]) -> None:
    codes, bits = case
    [unpacked] = run_model(unpack_model(bits, codes.shape[1]), {"words": pack(codes, bits)})
    assert unpacked.dtype == np.int64
    assert np.array_equal(unpacked, codes)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_the_nodes_are_ones_that_tensorrt_parses(bits: int) -> None:
    nodes = unpack_nodes("words", "codes", "p_", bits, 33)
    assert {node.op_type for node in nodes} <= {
        "Cast", "Constant", "Div", "Mod", "Mul", "Pad", "ReduceSum", "Reshape", "Slice", "Unsqueeze"
    }  # fmt: skip


def test_two_unpackings_fit_into_one_graph() -> None:
    """Names carry the prefix, so a pass may unpack many layers."""
    nodes = [*unpack_nodes("a.words", "a.codes", "a.", 6, 20), *unpack_nodes("b.words", "b.codes", "b.", 6, 20)]
    outputs = [output for node in nodes for output in node.output]
    names = [node.name for node in nodes]
    assert len(set(outputs)) == len(outputs)
    assert len(set(names)) == len(names)
