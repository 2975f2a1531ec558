"""Presets, and how a rule's gaps are filled from one."""

from typing import Any

import pytest

from exporter import recipe
from exporter.layer_section import LayerRule
from exporter.presets import PRESETS, LayerScheme, preset_scheme, resolve_rule
from plugins.block_scales import BLOCK_SCALINGS
from plugins.formats import ACTIVATION_FORMATS, FORMATS, WEIGHT_FORMATS


def test_every_preset_of_the_recipe_exists_and_does_what_its_name_says() -> None:
    assert set(PRESETS) == set(recipe.PRESETS)
    for name, scheme in PRESETS.items():
        if scheme.scales in BLOCK_SCALINGS:
            continue
        weight_bits, activation_bits = name.removeprefix("w").removesuffix("_int").split("a")
        assert name.endswith("_int") == scheme.activation_format.startswith("int")
        assert scheme.weight_format in WEIGHT_FORMATS
        assert FORMATS[scheme.weight_format].bits == int(weight_bits)
        if scheme.activation_format == "none":
            assert activation_bits == "16"
        else:
            assert scheme.activation_format in ACTIVATION_FORMATS
            assert FORMATS[scheme.activation_format].bits == int(activation_bits)


@pytest.mark.parametrize(
    ("rule", "preset", "scheme"),
    [
        ({}, "w4a6", LayerScheme("e2m1", 128, "foldable", "e2m3")),
        ({"weight": "e1m2"}, "w4a6", LayerScheme("e1m2", 128, "foldable", "e2m3")),
        ({"weight": "e3m0", "scales": "channel"}, "w4a6", LayerScheme("e3m0", 0, "channel", "e2m3")),
        ({"group": 0}, "w4a6", LayerScheme("e2m1", 0, "channel", "e2m3")),
        ({"group": 64}, "w4a6", LayerScheme("e2m1", 64, "foldable", "e2m3")),
        ({"scales": "group"}, "w4a6", LayerScheme("e2m1", 128, "group", "e2m3")),
        ({"weight": "e2m1", "group": 64}, "w8a8", LayerScheme("e2m1", 64, "foldable", "e4m3")),
        ({"weight": "e2m1", "scales": "foldable"}, "w8a8", LayerScheme("e2m1", 128, "foldable", "e4m3")),
        ({"activation": "none"}, "w4a8", LayerScheme("e2m1", 128, "foldable", "none")),
        ({"weight": "int8", "scales": "channel"}, None, LayerScheme("int8", 0, "channel", "none")),
        ({"weight": "none"}, "w4a6", None),
        ({}, "nvfp4", LayerScheme("e2m1", 16, "nvfp4", "e2m1")),
        ({"scales": "nvfp4"}, "w4a6", LayerScheme("e2m1", 16, "nvfp4", "e2m1")),
        ({"scales": "mx"}, None, LayerScheme("e4m3", 32, "mx", "e4m3")),
        ({"scales": "foldable"}, "nvfp4", LayerScheme("e2m1", 128, "foldable", "e2m1")),
        ({"group": 64}, "nvfp4", LayerScheme("e2m1", 64, "foldable", "e2m1")),
        ({"scales": "channel", "activation": "e4m3"}, "nvfp4", LayerScheme("e2m1", 0, "channel", "e4m3")),
        ({"weight": "none"}, "nvfp4", None),
        ({}, "w4a8_int", LayerScheme("e2m1", 128, "foldable", "int8")),
        ({"container": "fp8"}, "w4a6", LayerScheme("e2m1", 128, "foldable", "e2m3", "fp8")),
        (
            {"output": "e4m3", "output_group": 64},
            "w4a6",
            LayerScheme("e2m1", 128, "foldable", "e2m3", output_format="e4m3", output_group=64),
        ),
        ({"low_rank": 8, "hadamard": 64}, "w4a6", LayerScheme("e2m1", 128, "foldable", "e2m3", "auto", 8, 64)),
    ],
)
def test_a_rule_s_gaps_come_from_the_preset(rule: dict[str, Any], preset: Any, scheme: LayerScheme | None) -> None:
    assert resolve_rule(LayerRule(match="*", **rule), preset) == scheme


def test_a_rule_s_container_comes_before_the_recipe_s() -> None:
    def container(rule: LayerRule) -> str:
        scheme = resolve_rule(rule, "w4a6", "fp8")
        assert scheme is not None
        return scheme.container

    assert container(LayerRule(match="*")) == "fp8"
    assert container(LayerRule(match="*", container="auto")) == "auto"
    assert preset_scheme("w4a6", "fp8") == LayerScheme("e2m1", 128, "foldable", "e2m3", "fp8")
    assert preset_scheme(None, "fp8") is None


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_presets_of_block_scaling_are_what_their_scaling_says(name: str) -> None:
    scheme = PRESETS[name]  # type: ignore[index]
    scaling = BLOCK_SCALINGS[scheme.scales]
    assert scheme == LayerScheme(scaling.value_format, scaling.group_size, scaling.name, scaling.value_format)
