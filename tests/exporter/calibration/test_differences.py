"""What is said of two calibrations that differ."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.calibration.differences import differences

LAYER = {"name": "blocks.0.to_q", "weight_format": "e2m1", "activation_format": "e2m3", "group_size": 128, "m": [1, 2]}


def _with(*layers: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"program": "p", "files": {"w.safetensors": "0"}, "method": {"iterations": 4}, "layers": layers, **settings}


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (_with(LAYER), ""),
        (_with(LAYER | {"activation_format": "int8"}), "blocks.0.to_q: activation e2m3, not int8"),
        (_with(LAYER | {"group_size": 0}), "blocks.0.to_q: group 128, not 0"),
        (_with(LAYER | {"m": [1]}), "blocks.0.to_q: multipliers [1, 2], not [1]"),
        (
            _with({**LAYER, "name": "blocks.0.to_q.linear", "low_rank": 8}),
            "blocks.0.to_q: low_rank none, not 8",
        ),
        (_with(LAYER | {"weight_format": "auto", "m": [1], "candidates": ["e2m1", "e3m0"]}), ""),
        (_with(), "blocks.0.to_q quantized, not in high precision"),
        (
            _with(LAYER, LAYER | {"name": "proj"}, method={"iterations": 5}),
            "method.iterations 4, not 5; proj in high precision, not quantized",
        ),
        (_with(LAYER, program="q"), "another version of fp4export or of its libraries"),
        (_with(LAYER, files={"w.safetensors": "1"}), "another content of w.safetensors"),
        (_with(LAYER, latent_shape=[3, 5, 5]), "model.resolution: latents none, not [3, 5, 5]"),
        (
            _with({"name": "blocks.0.to_q", "weight_format": "e1m2"}, method={"iterations": 5}),
            "method.iterations 4, not 5; blocks.0.to_q: weight e2m1, not e1m2; "
            "blocks.0.to_q: activation e2m3, not none; and 2 more",
        ),
    ],
)
def test_the_first_differences_are_named_and_the_others_counted(now: dict[str, Any], words: str) -> None:
    assert differences(_with(LAYER), now) == words
