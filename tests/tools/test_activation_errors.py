"""What the table of quantized activations says of layers' inputs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tools.activation_errors import LayerInputs, quantizers, section


def _seen(x: torch.Tensor, *, behind_gelu: bool = False) -> LayerInputs:
    generator = torch.Generator().manual_seed(1)
    inputs = LayerInputs(torch.randn(8, x.shape[-1], generator=generator), quantizers(behind_gelu))
    for part in x.split(16):
        inputs.add(part)
    return inputs


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(64, 4, 128, generator=torch.Generator().manual_seed(0))


def test_a_channel_far_larger_than_the_rest_costs_integers_more_than_floats(noise: torch.Tensor) -> None:
    even, uneven = _seen(noise), _seen(noise * torch.ones(128).index_fill(0, torch.tensor([3]), 40.0))
    assert even.spread < 2 < 20 < uneven.spread
    lost = {title: even.snr_db(title) - uneven.snr_db(title) for title in ("INT6", "E2M3")}
    assert lost["INT6"] > lost["E2M3"] + 1


def test_what_a_gelu_makes_is_closer_without_a_sign(noise: torch.Tensor) -> None:
    found = _seen(F.gelu(noise), behind_gelu=True)
    assert found.negative_square / found.square < 0.1
    assert found.snr_db("UE2M4") > found.snr_db("E2M3") + 3
    assert found.snr_db("INT6, zero point") > found.snr_db("INT6") + 3


def test_eight_bits_are_closer_than_six_and_these_than_four(noise: torch.Tensor) -> None:
    found = _seen(noise)
    for kind in ("INT{}", "INT{}, zero point"):
        eight, six, four = (found.snr_db(kind.format(bits)) for bits in (8, 6, 4))
        assert eight > six + 10 > four + 20


def test_the_section_has_both_tables_and_dashes_where_a_format_is_not_for_a_layer(noise: torch.Tensor) -> None:
    kinds = {"attn1.to_q": [_seen(noise)], "ff.net.2": [_seen(F.gelu(noise), behind_gelu=True)]}
    text = section(kinds, kinds)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 4
    assert rows[0].count("–") == 2
    assert "–" not in rows[1]
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {rows[0].count("|")}
