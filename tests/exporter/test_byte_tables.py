"""Tables of bytes against numpy's own indexing."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from exporter.byte_tables import look_up


@given(st.data(), st.sampled_from([np.uint8, np.int8, np.bool_]), st.sampled_from([np.uint8, np.int8]))
def test_is_indexing(data: st.DataObject, entries: type[Any], places: type[Any]) -> None:
    size = data.draw(st.integers(1, 256))
    table = data.draw(arrays.arrays(entries, size))
    least, most = (max(-size, -128), min(size - 1, 127)) if places is np.int8 else (0, size - 1)
    shape = data.draw(arrays.array_shapes(min_dims=1, max_dims=3, min_side=0))
    indices: npt.NDArray[Any] = data.draw(arrays.arrays(places, shape, elements=st.integers(least, most)))
    found = look_up(table, indices.T)
    assert found.dtype == table.dtype
    np.testing.assert_array_equal(found, table[indices.T])


@pytest.mark.parametrize("outside", [np.array([5], np.uint8), np.array([-6], np.int8)])
def test_an_index_outside_is_refused(outside: npt.NDArray[Any]) -> None:
    with pytest.raises(IndexError, match="5 entries"):
        look_up(np.zeros(5, np.uint8), outside)


def test_longer_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not bytes"):
        look_up(np.zeros(5, np.int16), np.zeros(2, np.uint8))
