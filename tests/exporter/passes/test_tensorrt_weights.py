"""Weights of 4 bits in a TensorRT graph: the bits of the container's constants, from INT4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from exporter.compute import Compute
from exporter.errors import InputError
from exporter.layer_bytes import is_packable
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.tensorrt_weights import _fp8_bits, _ranks
from exporter.runtime.onnx_session import OnnxSession
from exporter.targets import TARGETS, Target
from plugins.containers import CONTAINERS, fits
from plugins.formats import WEIGHT_FORMATS, get_format
from tests.exporter.passes.waist_graphs import make_weight, one_linear, op_types, run, snr_db, tokens

SM89 = TARGETS["rtx-sm89"]
PACKED = SM89.with_storage("packed")
SMALL = [name for name in WEIGHT_FORMATS if get_format(name).bits <= 4]
CASES = [
    (name, kind, container)
    for name in SMALL
    for container in ("int8", "fp8")
    if fits(get_format(name), CONTAINERS[container])
    for kind in ("channel", "foldable")
]


def _lower(model: onnx.ModelProto, target: Target) -> onnx.ModelProto:
    waist, _ = run_passes(model, WAIST_PASSES, target)
    lowered, _ = run_passes(waist, lowering_passes(target), target)
    onnx.checker.check_model(lowered, full_check=True)
    return lowered


@pytest.mark.parametrize(("weight_format", "kind", "container"), CASES)
def test_the_product_reads_the_same_bits(weight_format: str, kind: str, container: str) -> None:
    weight = make_weight("fc", weight_format, 0 if kind == "channel" else 16, kind, container=container)
    model = one_linear(replace(weight, container=container), "e2m3" if container == "int8" else "e4m3")
    operands, outputs = [], []
    for target in (SM89, PACKED):
        lowered = _lower(model, target)
        product = next(node for node in lowered.graph.node if node.op_type == "MatMul")
        y, operand = run(lowered, tokens(), product.input[1])
        operands.append(operand)
        outputs.append(y)
    assert np.array_equal(*operands)
    assert np.array_equal(*outputs)


@pytest.mark.parametrize("fold_constants", [True, False])
@pytest.mark.parametrize(("weight_format", "kind", "container"), CASES)
def test_an_optimized_session_computes_the_same(
    weight_format: str, kind: str, container: str, fold_constants: bool
) -> None:
    weight = make_weight("fc", weight_format, 0 if kind == "channel" else 16, kind, container=container)
    activation_format = "e2m3" if container == "int8" else "e4m3"
    lowered = _lower(one_linear(replace(weight, container=container), activation_format), PACKED)
    session = OnnxSession(lowered, fold_constants=fold_constants)
    y = session.run({session.inputs[0].name: tokens()})[session.outputs[0].name]
    assert snr_db(run(lowered, tokens())[0], y) > 120


@pytest.mark.parametrize(("weight_format", "kind", "container"), CASES)
def test_the_file_has_half_a_byte_a_weight(weight_format: str, kind: str, container: str) -> None:
    weight = make_weight("fc", weight_format, 0 if kind == "channel" else 16, kind, container=container)
    activation_format = "e2m3" if container == "int8" else "e4m3"
    lowered = _lower(one_linear(replace(weight, container=container), activation_format), PACKED)
    large = [tensor for tensor in lowered.graph.initializer if np.prod(tensor.dims) >= weight.codes.size]
    assert [tensor.data_type for tensor in large] == [TensorProto.INT4]
    assert list(large[0].dims) == [64, 24]


def test_e2m1_is_decoded_by_two_clips() -> None:
    operators = op_types(_lower(one_linear(make_weight("fc", group_size=0, kind="channel")), PACKED))
    assert operators.count("Clip") == 2
    uniform = op_types(_lower(one_linear(make_weight("fc", "e1m2", 0, "channel")), PACKED))
    assert "Clip" not in uniform


@pytest.mark.parametrize("name", SMALL)
def test_ranks_give_every_number(name: str) -> None:
    fmt = get_format(name)
    ranks, slopes = _ranks(fmt)
    rank = ranks.astype(np.int64)
    numbers = np.sign(rank) * np.concatenate([[0], np.cumsum(slopes)])[np.abs(rank)]
    assert np.array_equal(numbers, fmt.numerators)
    assert np.abs(rank).max() <= 7


def test_more_numbers_than_int4_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="e2m3 has no ranks"):
        _ranks(get_format("e2m3"))


@pytest.mark.parametrize(
    ("target", "weight_format", "kind", "activation_format"),
    [
        ("rtx-sm89", "e4m3", "channel", "e4m3"),
        ("rtx-sm86", "e1m2", "group", "none"),
        ("rtx-sm86", "int8", "channel", "int8"),
    ],
)
def test_what_is_not_decoded_stays_as_it_is(target: str, weight_format: str, kind: str, activation_format: str) -> None:
    weight = make_weight("fc", weight_format, 16 if kind == "group" else 0, kind)
    model = one_linear(weight, activation_format)
    graphs = [_lower(model, machine) for machine in (TARGETS[target], TARGETS[target].with_storage("packed"))]
    assert graphs[0].graph.SerializeToString() == graphs[1].graph.SerializeToString()


def test_only_small_formats_of_8_bit_containers_are_packed() -> None:
    assert is_packable(get_format("e2m1"), "int8")
    assert is_packable(get_format("e2m0"), "fp8")
    assert not is_packable(get_format("e2m3"), "int8")
    assert not is_packable(get_format("e1m2"), "int4")


def test_a_builder_that_cannot_have_packed_weights_refuses_them() -> None:
    with pytest.raises(InputError, match="rtx-sm75 takes `storage: container` only"):
        TARGETS["rtx-sm75"].with_storage("packed")


def test_kernels_and_storage_are_chosen_in_any_order() -> None:
    orin = TARGETS["orin"]
    assert orin.with_kernels("plugin").with_storage("packed") == orin.with_storage("packed").with_kernels("plugin")
    assert orin.with_storage("packed").with_kernels("plugin").with_kernels("native") == orin.with_storage("packed")


@pytest.mark.parametrize("target", ["rtx-sm80", "orin", "thor"])
@pytest.mark.parametrize("compute", get_args(Compute))
@pytest.mark.parametrize("activation_format", ["e2m3", "none"])
def test_every_parser_takes_it_in_every_compute_type(target: str, compute: Compute, activation_format: str) -> None:
    """`refuse_unsupported` is the last of the passes."""
    machine = TARGETS[target].with_storage("packed")
    waist, _ = run_passes(one_linear(make_weight("fc"), activation_format), WAIST_PASSES, machine)
    lowered, _ = run_passes(waist, lowering_passes(machine, compute), machine)
    assert [t.name for t in lowered.graph.initializer if t.data_type == TensorProto.INT4] == ["fc.ranks"]


def test_weights_alone_are_decoded_to_the_same_bits() -> None:
    model = one_linear(make_weight("fc"), "none")
    assert np.array_equal(*(run(_lower(model, target), tokens())[0] for target in (SM89, PACKED)))


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_numbers_that_fp8_lacks_are_refused(dtype: type[np.signedinteger[Any]]) -> None:
    """17 needs five significand bits; bytes are looked up, longer numbers converted."""
    with pytest.raises(ValueError, match="not exact in float8_e4m3fn"):
        _fp8_bits(np.array([[-3, 17]], dtype), 1.0)
    exact = np.array([[-3, 15, -128, 0], [-1, 30, 120, 26]], dtype).T
    expected = (exact * 0.5).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(_fp8_bits(exact, 0.5), expected.view(np.uint8))
