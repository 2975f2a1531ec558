"""Containers: which one a layer gets on which target, and refusals that say what works."""

from dataclasses import replace

import numpy as np
import pytest

from exporter.container_choice import (
    choose_container,
    container_product,
    has_kernel,
    kernel_container,
    needs_vnni,
    scale_multipliers,
)
from exporter.errors import InputError
from exporter.presets import PRESETS, LayerScheme
from exporter.targets import TARGETS
from plugins.containers import CONTAINERS, FP8, INT8, Container
from plugins.formats import UNSIGNED_ACTIVATION_FORMATS, get_format
from plugins.token_quantize.variant import MAX_K

W4A6, W4A8, W8A8, W4A16 = (PRESETS[name] for name in ("w4a6", "w4a8", "w8a8", "w4a16"))
GROUPED = LayerScheme("e2m1", 128, "group", "e2m3")
INT4_ONLY = LayerScheme("e1m2", 64, "group", "none")


@pytest.mark.parametrize(
    ("scheme", "target", "container"),
    [
        (W4A6, "cpu", "int8"),
        (W4A6, "rtx-sm75", "int8"),
        (W4A6, "rtx-sm80", "int8"),
        (W4A6, "rtx-sm120", "int8"),
        (W4A6, "orin", "int8"),
        (W4A8, "cpu", "fp32"),
        (W4A8, "rtx-sm89", "fp8"),
        (W4A8, "h200", "fp8"),
        (W8A8, "rtx-sm89", "fp8"),
        (W4A16, "cpu", "fp32"),
        (W4A16, "rtx-sm75", "int8"),
        (W4A16, "rtx-sm86", "int8"),
        (GROUPED, "cpu", "fp32"),
        (INT4_ONLY, "rtx-sm80", "int4"),
        (LayerScheme("e3m0", 0, "channel", "e2m3"), "rtx-sm86", "int8"),
        (LayerScheme("e2m1", 0, "channel", "e3m2"), "rtx-sm89", "fp8"),
        (LayerScheme("int8", 0, "channel", "int8"), "cpu", "int8"),
        (LayerScheme("int4", 128, "foldable", "int6"), "rtx-sm80", "int8"),
        (PRESETS["w4a8_int"], "cpu", "int8"),
        (PRESETS["nvfp4"], "cpu", "fp32"),
        (PRESETS["nvfp4"], "rtx-sm120", "fp4"),
        (PRESETS["nvfp4"], "thor", "fp4"),
        (PRESETS["mxfp8"], "cpu", "fp32"),
        (PRESETS["mxfp8"], "rtx-sm121", "mxfp8"),
        (PRESETS["mxfp8"], "b200", "mxfp8"),
        (PRESETS["w4a8_int"], "rtx-sm80", "int8"),
        (replace(W4A6, container="fp8"), "rtx-sm89", "fp8"),
        (replace(W4A6, container="int8"), "rtx-sm89", "int8"),
        (replace(W4A6, container="int8"), "cpu", "int8"),
    ],
)
def test_the_container(scheme: LayerScheme, target: str, container: str) -> None:
    assert choose_container("layer", scheme, 1152, TARGETS[target]) == container


@pytest.mark.parametrize(
    ("scheme", "target", "message", "works"),
    [
        (W4A8, "rtx-sm86", "e4m3 values do not fit int8", "rtx-sm89"),
        (W8A8, "orin", "e4m3 values do not fit int8", "h100"),
        (GROUPED, "rtx-sm89", "use `scales: foldable`", "cpu"),
        (W4A8, "rtx-sm75", "e4m3 values do not fit int8", "rtx-sm89"),
        (INT4_ONLY, "rtx-sm75", "group scales need e1m2 or int4 weights and an INT4 engine", "rtx-sm80"),
        (replace(INT4_ONLY, weight_format="e2m1"), "rtx-sm80", "group scales need e1m2 or int4 weights", "cpu"),
        (LayerScheme("e2m1", 0, "channel", "e3m4"), "rtx-sm120", "e3m4 values do not fit int8 or fp8", "cpu"),
        (
            replace(W4A6, container="fp8"),
            "rtx-sm86",
            r"in fp8: it is exact there in int8; use",
            "h100",
        ),
        (replace(W4A6, container="fp8"), "cpu", r"exact there in int8 or fp32", "rtx-sm89"),
        (replace(W4A8, container="int8"), "rtx-sm89", r"in int8: it is exact there in fp8", "none"),
        (replace(W4A16, container="fp8"), "rtx-sm89", r"in fp8: it is exact there in int8", "none"),
        (PRESETS["nvfp4"], "rtx-sm89", "multiplies no blocks with scales of their own; `preset: w4a6`", "rtx-sm120"),
        (PRESETS["mxfp8"], "h100", "multiplies no blocks with scales of their own", "b200"),
        (replace(PRESETS["nvfp4"], container="int8"), "b200", "exact there in fp4; use `container: auto`", "none"),
        (LayerScheme("int8", 0, "channel", "e4m3"), "rtx-sm89", "do not fit the same one of int8, fp8", "cpu"),
    ],
)
def test_a_refusal_names_the_layer_the_reason_and_targets_that_work(
    scheme: LayerScheme, target: str, message: str, works: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        choose_container("blocks.3.to_q", scheme, 1152, TARGETS[target])
    assert f"blocks.3.to_q: target {target} cannot run" in str(caught.value)
    assert works in str(caught.value).rpartition("targets that can:")[2]


@pytest.mark.parametrize(
    ("scheme", "target", "container"),
    [
        (W4A6, "orin", "int8"),
        (W4A8, "orin", "fp16"),
        (W4A8, "l4", "fp8"),
        (GROUPED, "orin", "int8"),
        (replace(GROUPED, activation_format="e4m3"), "h100", "fp8"),
        (W4A16, "orin", "fp16"),
        (replace(INT4_ONLY, weight_format="e2m1"), "thor", "fp16"),
        (replace(W4A6, container="fp8"), "h100", "fp8"),
        (replace(W4A6, container="fp16"), "orin", "fp16"),
        (LayerScheme("e2m3", 64, "group", "e3m2"), "orin", "fp16"),
        (W8A8, "l4", "fp8"),
        (PRESETS["nvfp4"], "b200", "fp4"),
    ],
)
def test_the_container_of_plugins(scheme: LayerScheme, target: str, container: str) -> None:
    machine = TARGETS[target].with_kernels("plugin")
    assert choose_container("layer", scheme, 1152, machine) == container
    packed = scheme.weight_format != "e4m3" and scheme.scales != "nvfp4"
    assert has_kernel(scheme, 1152) == packed


@pytest.mark.parametrize("activation", UNSIGNED_ACTIVATION_FORMATS)
def test_unsigned_activations_are_for_tensorrt_s_own_kernels_where_others_are_for_plugins(activation: str) -> None:
    scheme = replace(W4A6, activation_format=activation)
    for target in TARGETS.values():
        assert choose_container("layer", scheme, 1152, target) == "int8"
    assert choose_container("layer", scheme, 1152, TARGETS["orin"].with_kernels("plugin")) == "int8"
    assert not has_kernel(scheme, 1152)
    assert kernel_container(scheme, 1152, has_fp8=True) is None
    with pytest.raises(InputError, match="use `scales: foldable`"):
        choose_container("layer", replace(scheme, scales="group"), 1152, TARGETS["orin"].with_kernels("plugin"))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (W8A8, "e4m3 values do not fit int8"),
        (LayerScheme("e2m1", 0, "channel", "e3m4"), "e3m4 values do not fit int8"),
        (replace(W4A6, container="fp8"), "exact there in int8 or fp16"),
        (PRESETS["nvfp4"], "multiplies no blocks"),
        (LayerScheme("int8", 128, "group", "int8"), "free group scales do not factor out"),
    ],
)
def test_what_plugins_cannot_run(scheme: LayerScheme, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_container("layer", scheme, 1152, TARGETS["orin"].with_kernels("plugin"))


def test_tokens_longer_than_a_kernel_holds_are_lowered_without_plugins() -> None:
    assert has_kernel(W4A6, MAX_K)
    assert not has_kernel(W4A6, MAX_K + 128)
    assert choose_container("layer", W4A6, MAX_K + 128, TARGETS["orin"].with_kernels("plugin")) == "int8"


def test_int8_sums_of_a_kernel_may_be_shorter_than_the_containers() -> None:
    scheme = LayerScheme("e1m2", 128, "foldable", "e2m3")
    assert container_product(scheme, 8448, INT8).exact
    assert choose_container("layer", scheme, 8448, TARGETS["orin"].with_kernels("plugin")) == "fp16"
    assert choose_container("layer", scheme, 8320, TARGETS["orin"].with_kernels("plugin")) == "int8"


def test_a_refusal_tells_what_plugins_can() -> None:
    with pytest.raises(InputError, match="; on this one `kernels: plugin` can"):
        choose_container("layer", W4A8, 1152, TARGETS["orin"])
    with pytest.raises(InputError) as caught:
        choose_container("layer", W8A8, 1152, TARGETS["orin"])
    assert "plugin" not in str(caught.value)


def test_sums_too_long_for_the_accumulator_do_not_use_integers() -> None:
    longest = (2**31 - 1) // (12 * 10 * 60)
    for target, beyond in (("cpu", "fp32"), ("rtx-sm89", "fp8")):
        assert choose_container("layer", W4A6, longest, TARGETS[target]) == "int8"
        assert choose_container("layer", W4A6, longest + 1, TARGETS[target]) == beyond
    with pytest.raises(InputError, match=rf"sums of {longest + 1} reach .* past the accumulator's 2147483647"):
        choose_container("layer", W4A6, longest + 1, TARGETS["rtx-sm86"])


@pytest.mark.parametrize("container", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["e2m1", "e1m2", "int4"])
def test_folded_weights_are_exact_in_the_container(name: str, container: str) -> None:
    allowed = scale_multipliers(LayerScheme(name, 128, "foldable", "e2m3"), container)
    assert len(allowed) > 3
    fmt = get_format(name)
    numerators = fmt.values[fmt.valid].astype(np.float64) / fmt.step
    # A power of two for the whole tensor goes into the row's scale.
    unit = 1.0 if container == "int8" else CONTAINERS["fp8"].smallest
    for multiplier in allowed:
        folded = numerators * multiplier * unit
        assert np.array_equal(folded.astype(CONTAINERS[container].dtype).astype(np.float64), folded), multiplier


def test_other_scales_have_no_multipliers() -> None:
    assert scale_multipliers(GROUPED, "fp32") == (1,)
    assert scale_multipliers(LayerScheme("e3m0", 128, "foldable", "e2m3"), "int8") == (1,)


@pytest.mark.parametrize(
    ("scheme", "container", "needed"),
    [
        (LayerScheme("e2m1", 128, "foldable", "int8"), INT8, True),
        (LayerScheme("e2m1", 0, "channel", "int8"), INT8, False),
        (LayerScheme("e2m1", 128, "foldable", "e2m3"), INT8, False),
        (LayerScheme("e2m1", 128, "foldable", "ue2m4"), INT8, False),
        (LayerScheme("int8", 0, "channel", "ue2m4"), INT8, False),
        (LayerScheme("e2m1", 128, "foldable", "e4m3"), FP8, False),
        (LayerScheme("e2m1", 128, "foldable", "none"), INT8, False),
    ],
)
def test_pairs_of_products_past_16_bits_need_vnni(scheme: LayerScheme, container: Container, needed: bool) -> None:
    assert needs_vnni(container_product(scheme, 1152, container)) == needed
