"""The plan: which layer gets what, and what makes a plan impossible."""

from pathlib import Path
from typing import Any

import pytest

from exporter.errors import InputError
from exporter.plan import LayerPlan, LinearShape, ModelShapes, Plan, plan_layers
from exporter.recipe import Recipe
from exporter.targets import TARGETS, Storage

HIGH_PRECISION = ("embed.*", "proj_out")
LINEARS = {
    "embed.linear": LinearShape(256, 64, True),
    "blocks.0.attn.to_q": LinearShape(256, 256, True),
    "blocks.0.ff.net.0.proj": LinearShape(1024, 256, False),
    "blocks.1.attn.to_q": LinearShape(256, 256, True),
    "blocks.1.ff.net.0.proj": LinearShape(1024, 256, False),
    "proj_out": LinearShape(4, 256, True),
}
SHAPES = ModelShapes(LINEARS, {"patch.proj": 100, "table": 512})


def planned(shapes: ModelShapes = SHAPES, target: str = "cpu", storage: Storage | None = None, **fields: Any) -> Plan:
    """The plan of a recipe with these fields, for a target with its own storage or another."""
    data = {"model": {"weights": "w"}, "calibration": {"prompts": "p"}, **fields}
    machine = TARGETS[target] if storage is None else TARGETS[target].with_storage(storage)
    return plan_layers(Recipe.model_validate(data), shapes, HIGH_PRECISION, machine)


def test_the_preset_covers_every_linear_layer_that_the_family_quantizes() -> None:
    plan = planned(preset="w4a6")
    assert [layer.name for layer in plan.layers] == [name for name in LINEARS if name.startswith("blocks")]
    assert plan.layer("blocks.0.ff.net.0.proj") == LayerPlan(
        name="blocks.0.ff.net.0.proj",
        out_features=1024,
        in_features=256,
        has_bias=False,
        weight_format="e2m1",
        activation_format="e2m3",
        group_size=128,
        scales="foldable",
        container="int8",
    )
    assert dict(plan.high_precision) == {
        "patch.proj": 100,
        "table": 512,
        "embed.linear": 256 * 65,
        "proj_out": 4 * 257,
    }


def test_formats_are_left_open_among_floats_of_the_presets_width() -> None:
    plan = planned(preset="w4a6", layers=[{"match": "*.attn.*", "weight": "auto"}])
    assert [layer.name for layer in plan.open] == ["blocks.0.attn.to_q", "blocks.1.attn.to_q"]
    for layer in plan.open:
        kinds = [(one.weight_format, one.scales, one.group_size) for one in layer.candidates]
        assert kinds == [("e2m1", "foldable", 128), ("e1m2", "foldable", 128), ("e3m0", "channel", 0)]
        assert plan.layer(layer.name) == layer.candidates[0]
        assert not layer.refused
    decided = plan.decided({"blocks.0.attn.to_q": "e3m0", "blocks.1.attn.to_q": "e1m2"})
    assert not decided.open
    changed = {layer.name: layer for layer in decided.layers if layer not in plan.layers}
    assert changed == {plan.open[0].name: plan.open[0].candidates[2], plan.open[1].name: plan.open[1].candidates[1]}
    eight = planned(preset="w8a8", layers=[{"match": "*.attn.*", "weight": "auto"}]).open[0]
    assert [one.weight_format for one in eight.candidates] == ["e4m3", "e5m2", "e3m4"]


def test_formats_that_the_target_does_not_hold_are_no_candidates() -> None:
    auto = [{"match": "*.attn.*", "weight": "auto"}]
    with pytest.raises(InputError, match=r"`weight: auto` has nothing to choose from: e5m2: .*e5m2 .*; e3m4: .*name a"):
        planned(preset="w8a8", target="rtx-sm89", layers=auto)
    # In the container of the preset's own format.
    mixed = [{"match": "*.attn.*", "weight": "auto", "scales": "channel", "activation": "int8"}]
    shapes = ModelShapes({"blocks.0.attn.to_q": LinearShape(8, 300_000, False)}, {})
    (layer,) = planned(shapes, preset="w4a6", layers=mixed).open
    assert {one.weight_format: one.container for one in layer.candidates} == {"e2m1": "int8", "e1m2": "int8"}
    assert layer.refused == {"e3m0": "fp32 instead of int8"}


def test_the_first_matching_rule_wins_and_inherits_from_the_preset() -> None:
    plan = planned(
        preset="w4a6",
        layers=[
            {"match": "blocks.0.*", "weight": "none"},
            {"match": "*.ff.net.0.proj", "weight": "e3m0", "scales": "channel"},
        ],
    )
    assert [layer.name for layer in plan.layers] == ["blocks.1.attn.to_q", "blocks.1.ff.net.0.proj"]
    assert [layer.weight_format for layer in plan.layers] == ["e2m1", "e3m0"]
    assert [layer.activation_format for layer in plan.layers] == ["e2m3", "e2m3"]
    assert [layer.groups for layer in plan.layers] == [2, 1]
    assert "blocks.0.attn.to_q" in dict(plan.high_precision)


def test_a_rule_can_quantize_what_the_family_keeps() -> None:
    plan = planned(preset="w4a6", layers=[{"match": "proj_out", "weight": "int8", "scales": "channel"}])
    assert plan.layer("proj_out").weight_format == "int8"


def test_without_a_preset_only_rules_quantize() -> None:
    plan = planned(layers=[{"match": "*.to_q", "weight": "e2m1", "scales": "channel"}])
    assert [layer.name for layer in plan.layers] == ["blocks.0.attn.to_q", "blocks.1.attn.to_q"]
    assert plan.layers[0].activation_format == "none"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [{"match": "*.attn.to_k"}],
            r"layers\[0\]\.match: '\*\.attn\.to_k' matches no layer; did you mean '\*\.attn\.to_q'",
        ),
        (
            [{"match": "blocks.*"}, {"match": "*.to_q"}],
            r"layers\[1\]\.match: .* matches only layers that earlier rules",
        ),
        ([{"match": "patch.*"}], "only linear layers are quantized: patch.proj"),
        ([{"match": "*", "weight": "none"}], "every layer stays in high precision"),
        (
            [{"match": "embed.*"}],
            "embed.linear: group 128 does not divide its 64 input features; nearest that does: 64",
        ),
        (
            [{"match": "*.to_q", "group": 100}],
            "group 100 does not divide its 256 input features; nearest that does: 128",
        ),
        (
            [{"match": "*.to_q", "weight": "e3m0"}],
            "e3m0 leaves no room for folding group scales; use `scales: channel`",
        ),
        ([{"match": "*.to_q", "weight": "int8"}], "int8 leaves no room"),
        (
            [{"match": "*.ff.*", "low_rank": 256}],
            r"blocks\.0\.ff\.net\.0\.proj: low_rank 256 is too much for a weight of 1024 x 256; at most 255",
        ),
        (
            [{"match": "*.to_q", "output": "e4m3", "output_group": 72}],
            r"blocks\.0\.attn\.to_q: output_group 72 does not divide its 256 output features; nearest that does: 64",
        ),
        (
            [{"match": "*.to_q", "weight": "auto", "group": 100}],
            r"blocks\.0\.attn\.to_q: group 100 does not divide its 256 input features; nearest that does: 128",
        ),
    ],
)
def test_rules_that_cannot_work(layers: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        planned(preset="w4a6", layers=layers)
    assert str(caught.value).startswith("recipe: ")


@pytest.mark.parametrize(("features", "advice"), [(96, "nearest that does: 16"), (1002, "no size does: leave it out")])
def test_a_rotation_that_does_not_fit_a_row_shows_one_that_does(features: int, advice: str) -> None:
    shapes = ModelShapes({"blocks.0.to_q": LinearShape(96, features, True)}, {})
    with pytest.raises(InputError, match=rf"hadamard 64 does not divide its {features} input features; {advice}"):
        planned(shapes, preset="w4a6", layers=[{"match": "*", "group": 0, "hadamard": 64}])


def test_transformed_layers_are_planned_inside_of_what_takes_their_place() -> None:
    rules = [{"match": "*.to_q", "low_rank": 8, "hadamard": 64}, {"match": "*.ff.net.0.proj", "hadamard": 64}]
    plan, plain = planned(preset="w4a6", layers=rules), planned(preset="w4a6")
    assert [layer.name for layer in plan.layers] == [f"{layer.name}.linear" for layer in plain.layers]
    assert [layer.original_name for layer in plan.layers] == [layer.name for layer in plain.layers]
    assert [(layer.low_rank, layer.hadamard) for layer in plan.layers] == [(8, 64), (0, 64)] * 2
    added = {name: count for name, count in plan.high_precision if name not in dict(plain.high_precision)}
    assert added == {f"blocks.{block}.attn.to_q.low_rank": 8 * 512 for block in (0, 1)}
    assert plan.expected_bytes - plain.expected_bytes == 4 * (2 * 8 * 512 + 64 * 64)


def test_layers_with_quantized_outputs_are_transformed_ones_that_take_no_more_room() -> None:
    rules = [{"match": "*.to_q", "output": "e4m3", "output_group": 64}]
    plan, plain = planned(preset="w4a6", layers=rules), planned(preset="w4a6")
    found = {layer.original_name: (layer.name, layer.output_format, layer.output_group) for layer in plan.layers}
    assert found["blocks.0.attn.to_q"] == ("blocks.0.attn.to_q.linear", "e4m3", 64)
    assert found["blocks.0.ff.net.0.proj"] == ("blocks.0.ff.net.0.proj", "none", 0)
    assert plan.expected_bytes == plain.expected_bytes
    assert plan.high_precision == plain.high_precision


def test_a_shifted_layer_gets_a_bias_that_takes_the_shift_back() -> None:
    shapes = ModelShapes({"blocks.0.ff.net.2": LinearShape(96, 128, False)}, {})
    rule = {"match": "*.ff.net.2", "activation": "ue2m4"}
    for shift, name in (("none", "blocks.0.ff.net.2"), ("gelu", "blocks.0.ff.net.2.linear")):
        (layer,) = planned(shapes, preset="w4a6", layers=[{**rule, "shift": shift}]).layers
        assert (layer.name, layer.activation_format, layer.shift) == (name, "ue2m4", shift)
        assert layer.has_bias == (shift == "gelu")
        assert layer.original_name == "blocks.0.ff.net.2"


def test_a_rule_may_call_a_transformed_layer_by_its_quantized_part() -> None:
    """As reports do, and the rules that `bisect` prints; but no pattern matches by the name's end."""
    rules = [{"match": "blocks.0.attn.to_q.linear", "weight": "none"}, {"match": "*.to_q", "low_rank": 8}]
    plan = planned(preset="w4a6", layers=rules)
    assert "blocks.0.attn.to_q" in dict(plan.high_precision)
    assert "blocks.1.attn.to_q.linear" in {layer.name for layer in plan.layers}
    only = planned(layers=[{"match": "*.linear", "group": 64}])
    assert [layer.name for layer in only.layers] == ["embed.linear"]


def test_a_preset_s_group_that_does_not_divide_shows_the_rule_that_helps() -> None:
    shapes = ModelShapes({"blocks.0.to_q": LinearShape(96, 96, True)}, {})
    with pytest.raises(InputError, match=r"preset w4a6: blocks\.0\.to_q: .*\{match: blocks\.\*, group: 96\}"):
        planned(shapes, preset="w4a6")
    assert planned(shapes, preset="w4a6", layers=[{"match": "blocks.*", "group": 96}]).layers[0].groups == 1


def test_a_refusal_of_the_target_names_recipe_and_layer() -> None:
    with pytest.raises(InputError, match=r"recipe: preset w4a8: blocks\.0\.attn\.to_q: target rtx-sm86 cannot run"):
        planned(preset="w4a8", target="rtx-sm86")


def test_the_expected_size_counts_codes_scales_multipliers_and_the_rest() -> None:
    one = ModelShapes({"blocks.0.to_q": LinearShape(256, 256, True)}, {"norm": 10})
    rest = 256 * 4 + 10 * 4
    assert planned(one, preset="w4a6").fp32_bytes == (256 * 257 + 10) * 4
    assert planned(one, preset="w4a6").expected_bytes == 256 * 128 + 256 * 2 + 256 * 4 + rest
    channel = [{"match": "*", "weight": "e2m3", "group": 0}]
    assert planned(one, preset="w4a6", layers=channel).expected_bytes == 256 * 192 + 256 * 4 + rest
    group = [{"match": "*", "scales": "group"}]
    assert planned(one, preset="w4a6", layers=group).expected_bytes == 256 * 128 + 256 * 2 * 4 + rest
    packed, container = 256 * 128 + 256 * 2 + 256 * 4 + rest, 256 * 256 + 256 * 4 + rest
    assert planned(one, preset="w4a6", target="rtx-sm89").expected_bytes == container
    assert planned(one, preset="w4a6", target="rtx-sm89", storage="packed").expected_bytes == packed
    assert planned(one, preset="w8a8", target="rtx-sm89", storage="packed").expected_bytes == container
    # INT4 has three bits, too.
    three = [{"match": "*", "weight": "e2m0"}]
    assert planned(one, preset="w4a6", layers=three, target="rtx-sm89", storage="packed").expected_bytes == packed
    assert planned(one, preset="w4a6", storage="container").expected_bytes == container
    # Weights alone are decoded to FP32 when the file is loaded, so that their 4 bits stay.
    assert planned(one, preset="w4a16", storage="container").expected_bytes == packed


def test_multipliers_fit_the_container() -> None:
    assert planned(preset="w4a6").layers[0].multipliers == tuple(range(1, 11))
    assert 7 not in planned(preset="w4a8", target="rtx-sm89").layers[0].multipliers
    assert planned(preset="w8a8").layers[0].multipliers == (1,)


def test_the_container_asked_for_decides_the_multipliers() -> None:
    layer = planned(preset="w4a6", container="fp8", target="rtx-sm89").layers[0]
    assert (layer.container, layer.asked_container) == ("fp8", "fp8")
    assert layer.multipliers == planned(preset="w4a8", target="rtx-sm89").layers[0].multipliers
    rules = [{"match": "*.to_q", "container": "fp8"}]
    layers = planned(preset="w4a6", layers=rules, target="rtx-sm89").layers
    assert [layer.container for layer in layers] == ["fp8", "int8"] * 2
    with pytest.raises(InputError, match=r"preset w4a6: blocks\.0\.attn\.to_q: target rtx-sm86 cannot run .* in fp8"):
        planned(preset="w4a6", container="fp8", target="rtx-sm86")


def test_block_scaling_needs_its_own_formats_and_groups() -> None:
    with pytest.raises(InputError, match=r"layers\[0\]: blocks\.0\.attn\.to_q: `scales: nvfp4` is for e2m1 weights"):
        planned(preset="nvfp4", layers=[{"match": "*.to_q", "activation": "e2m3"}])
    odd = ModelShapes({"blocks.0.to_q": LinearShape(24, 24, True)}, {})
    with pytest.raises(InputError, match=r"preset nvfp4: blocks\.0\.to_q: group 16 does not divide its 24"):
        planned(odd, preset="nvfp4")


def test_block_scales_are_a_byte_each_in_an_engine() -> None:
    one = ModelShapes({"blocks.0.to_q": LinearShape(256, 256, True)}, {})
    assert planned(one, preset="nvfp4", target="b200").expected_bytes == 256 * 128 + 256 * 16 + 256 * 4
    assert planned(one, preset="mxfp8", target="b200").expected_bytes == 256 * 256 + 256 * 8 + 256 * 4
    assert planned(one, preset="nvfp4").expected_bytes == 256 * 128 + 256 * 16 * 4 + 256 * 4


def test_a_plan_has_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, exporter.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
