"""The container that a layer gets, and the refusals."""

from __future__ import annotations

import onnx
import pytest

from exporter.errors import InputError
from exporter.passes import choose_containers, fold_scales, fuse_linear, run_passes
from exporter.passes.choose import forget_containers
from exporter.passes.layer_table import read_layer_table
from exporter.passes.order import PassOrderError
from exporter.targets import TARGETS
from tests.exporter.passes.waist_graphs import make_weight, one_linear

PASSES = (fuse_linear, fold_scales, choose_containers)


def _choose(target: str, weight_format: str, kind: str, activation_format: str, container: str = "int8") -> str:
    group_size = 0 if kind == "channel" else 16
    weight = make_weight("blocks.3.fc", weight_format, group_size, kind, container=container)
    model, _ = run_passes(one_linear(weight, activation_format), PASSES, TARGETS[target])
    (entry,) = read_layer_table(model)
    assert entry.scales == kind
    return entry.container


@pytest.mark.parametrize(
    ("target", "weight_format", "kind", "activation_format", "container"),
    [
        ("cpu", "e2m1", "foldable", "e2m3", "int8"),
        ("cpu", "e1m2", "channel", "e2m3", "int8"),
        ("cpu", "int8", "channel", "int8", "int8"),
        ("cpu", "e2m1", "group", "e2m3", "fp32"),
        ("cpu", "e2m1", "foldable", "e4m3", "fp32"),
        ("cpu", "e2m1", "foldable", "none", "fp32"),
        ("rtx-sm86", "e2m1", "foldable", "e2m3", "int8"),
        ("rtx-sm120", "e2m1", "foldable", "e2m3", "int8"),
        ("rtx-sm89", "e2m1", "channel", "e4m3", "fp8"),
        ("rtx-sm89", "e4m3", "channel", "e4m3", "fp8"),
        ("rtx-sm86", "e1m2", "group", "none", "int4"),
        ("rtx-sm86", "e2m1", "foldable", "none", "int8"),
    ],
)
def test_container(target: str, weight_format: str, kind: str, activation_format: str, container: str) -> None:
    assert _choose(target, weight_format, kind, activation_format) == container


@pytest.mark.parametrize(
    ("target", "weight_format", "kind", "activation_format", "hint"),
    [
        ("rtx-sm86", "e2m1", "channel", "e4m3", "e2m3"),
        ("rtx-sm89", "e2m1", "group", "e2m3", "foldable"),
        ("rtx-sm89", "e2m1", "group", "none", "foldable"),
    ],
)
def test_refusal_names_the_layer_and_what_works(
    target: str, weight_format: str, kind: str, activation_format: str, hint: str
) -> None:
    with pytest.raises(InputError, match=rf"blocks\.3\.fc.*{target}.*{hint}"):
        _choose(target, weight_format, kind, activation_format)


def test_multipliers_calibrated_for_another_container_are_refused() -> None:
    weight = make_weight("blocks.3.fc")
    weight.scales[:, 0] = weight.scales[:, 1] / 5 * 7
    weight.scales[:] = weight.scales[:, :1] / 7
    weight.scales[:, 0] *= 7
    with pytest.raises(InputError, match=r"blocks\.3\.fc.*7 times.*fp8"):
        run_passes(one_linear(weight, "e4m3"), PASSES, TARGETS["rtx-sm89"])


def test_running_twice_changes_nothing_more() -> None:
    model, _ = run_passes(one_linear(make_weight("fc")), PASSES, TARGETS["cpu"])
    assert run_passes(model, (choose_containers,), TARGETS["cpu"])[1][0].changed == 0


def test_unfused_layers_are_refused_instead_of_skipped() -> None:
    model: onnx.ModelProto = one_linear(make_weight("fc"))
    with pytest.raises(PassOrderError, match="choose_containers needs fuse_linear"):
        run_passes(model, (choose_containers,), TARGETS["cpu"])


def test_containers_of_another_target_are_forgotten() -> None:
    weight = make_weight("blocks.3.fc", "e2m1", 0, "channel")
    chosen, _ = run_passes(one_linear(weight, "e4m3"), PASSES, TARGETS["cpu"])
    with pytest.raises(InputError, match="in fp32"):
        run_passes(chosen, (choose_containers,), TARGETS["rtx-sm89"])
    again, (forgotten, _) = run_passes(chosen, (forget_containers, choose_containers), TARGETS["rtx-sm89"])
    assert forgotten.changed == 1
    assert read_layer_table(again)[0].container == "fp8"
    assert run_passes(one_linear(weight, "e4m3"), (forget_containers,), TARGETS["cpu"])[1][0].changed == 0
