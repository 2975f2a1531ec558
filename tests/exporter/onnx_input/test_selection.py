"""Which layers are quantized and how; every other one is listed with its reason."""

from __future__ import annotations

import pytest

from exporter.errors import InputError
from exporter.onnx_input.linears import find_linears
from exporter.onnx_input.selection import FormatOptions, Selection, format_options, select_layers
from exporter.passes.driver import import_graph
from exporter.targets import TARGETS
from tests.exporter.onnx_input.models import WIDTH, HandMade

NAMES = ("x_embedder", "blocks.0.to_q", "blocks.0.proj_out", "blocks.1.to_q", "model.proj_out")


def selected(options: FormatOptions, target: str = "cpu", names: tuple[str, ...] = NAMES) -> Selection:
    made = HandMade()
    hidden = "x"
    for index, name in enumerate(names):
        hidden = made.node("MatMul", hidden, made.random(f"{name}.weight", WIDTH, WIDTH), output=f"h{index}")
    graph = import_graph(made.model(hidden))
    return select_layers(find_linears(graph), options, TARGETS[target], "m.onnx")


def test_embedders_and_the_final_projection_stay_but_not_what_is_in_blocks() -> None:
    selection = selected(FormatOptions("e2m1", group=32))
    assert [layer.name for layer in selection.layers] == ["blocks.0.to_q", "blocks.0.proj_out", "blocks.1.to_q"]
    assert {kept.name: kept.reason for kept in selection.kept} == {
        "x_embedder": "by default: x_embedder embeds or projects",
        "model.proj_out": "by default: proj_out embeds or projects",
    }


def test_keep_adds_layers_with_its_pattern_as_the_reason() -> None:
    selection = selected(FormatOptions("e2m1", group=32, keep=("blocks.*.to_q",)))
    assert [layer.name for layer in selection.layers] == ["blocks.0.proj_out"]
    assert {kept.name: kept.reason for kept in selection.kept}["blocks.1.to_q"] == "--keep blocks.*.to_q"


def test_a_pattern_that_keeps_nothing_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"--keep 'blocks.0.to_p' matches no .*m\.onnx; did you mean 'blocks.0.to_q'"):
        selected(FormatOptions("e2m1", group=32, keep=("blocks.0.to_p",)))


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (128, "its 64 input features are fewer than a group of 128"),
        (48, "64 input features are no multiple of a"),
    ],
)
def test_rows_that_are_no_groups_stay_and_nothing_left_is_an_error(group: int, reason: str) -> None:
    with pytest.raises(InputError, match=f"nothing would be quantized: all 2 .*{reason}"):
        selected(FormatOptions("e2m1", group=group), names=("blocks.0.to_q", "blocks.1.to_q"))


def test_scales_are_foldable_where_the_format_leaves_room_else_per_channel() -> None:
    (layer, *_) = selected(FormatOptions("e2m1", group=32)).layers
    assert (layer.scales, layer.group_size, layer.activation_format, layer.container) == (
        "foldable",
        32,
        "e2m3",
        "int8",
    )
    (layer, *_) = selected(FormatOptions("e3m0")).layers
    assert (layer.scales, layer.group_size) == ("channel", 0)
    (layer, *_) = selected(FormatOptions("e2m1", scales="group", group=16, activation="none")).layers
    assert (layer.scales, layer.group_size, layer.activation_format) == ("group", 16, "none")


def test_a_group_for_a_format_without_room_is_refused() -> None:
    with pytest.raises(InputError, match="--group 32: e3m0 leaves no room"):
        selected(FormatOptions("e3m0", group=32))


def test_what_the_target_cannot_run_is_refused_by_layer() -> None:
    with pytest.raises(InputError, match=r"blocks\.0\.to_q: target rtx-sm86 cannot run e2m1 weights with e4m3"):
        selected(FormatOptions("e2m1", activation="e4m3", group=32), "rtx-sm86", ("blocks.0.to_q",))


def test_no_linear_layer_at_all() -> None:
    made = HandMade()
    graph = import_graph(made.model(made.node("Abs", "x", output="y")))
    with pytest.raises(InputError, match=r"m\.onnx: no linear layer found"):
        select_layers(find_linears(graph), FormatOptions("e2m1"), TARGETS["cpu"], "m.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "e2m4"}, "--format: unknown format 'e2m4'; did you mean 'e2m3'"),
        ({"weight": "e2m1", "activation": "e3m0"}, "--activation: unknown format 'e3m0'"),
        ({"weight": "e2m1", "scales": "channel", "group": 32}, "channel scales have no groups"),
        ({"weight": "e2m1", "group": 0}, "--group 0: must be at least 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FormatOptions(**options)  # type: ignore[arg-type]


def test_details_need_a_format() -> None:
    assert format_options(None, None, None, None, ()) is None
    assert format_options("e2m1", None, None, None, ()) == FormatOptions("e2m1")
    with pytest.raises(InputError, match="--keep needs a weight format"):
        format_options(None, None, None, None, ("a",))
