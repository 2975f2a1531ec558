"""The fake quantizer: its definition against the online quantizer's, its function body bit for bit against it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from plugins.fake_quantize.reference import fake_quantize
from plugins.float_quantize.reference import quantize_online
from plugins.formats import ACTIVATION_FORMATS, UnknownFormatError, get_format
from plugins.op import FakeQuantize

Run = Callable[..., list[np.ndarray]]


def tokens(*shape: int) -> np.ndarray:
    """Heavy-tailed rows of very different sizes, one of them zero."""
    generator = np.random.default_rng(0)
    x = generator.standard_t(3, shape) * np.exp2(generator.uniform(-20, 20, (*shape[:-1], 1)))
    x[(0,) * (x.ndim - 1)] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("name", ACTIVATION_FORMATS)
def test_the_body_equals_the_reference(name: str, group_size: int, run_variant: Run) -> None:
    x = tokens(3, 5, 64)
    [found] = run_variant(FakeQuantize(name, group_size), x)
    assert found.dtype == np.float32
    assert np.array_equal(found, fake_quantize(x, get_format(name), group_size))


def test_every_group_of_a_token_is_rounded_on_its_own() -> None:
    x, fmt = tokens(4, 96), get_format("e4m3")
    parts = [np.multiply(*quantize_online(x[:, start : start + 32], fmt)) for start in (0, 32, 64)]
    assert np.array_equal(fake_quantize(x, fmt, 32), np.concatenate(parts, axis=-1))
    assert np.array_equal(fake_quantize(x, fmt), np.multiply(*quantize_online(x, fmt)))
    assert not np.array_equal(fake_quantize(x, fmt), fake_quantize(x, fmt, 32))


def test_formats_that_activations_do_not_have_are_refused() -> None:
    with pytest.raises(UnknownFormatError, match="'e3m0' is no activation format; valid: e2m1"):
        FakeQuantize("e3m0")
    with pytest.raises(UnknownFormatError, match="did you mean 'e4m3'"):
        FakeQuantize("e4m4")
