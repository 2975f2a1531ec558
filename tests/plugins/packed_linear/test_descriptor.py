"""Names, inputs and refusals; the function body and the reference against each other and a plain product."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from plugins.containers import FP8, INT8, factor
from plugins.formats import UnknownFormatError
from plugins.op import parse
from plugins.packed_linear.descriptor import PackedLinear, VariantError
from plugins.packed_linear.reference import packed_linear
from plugins.weight import GroupError
from tests.plugins.conftest import in_onnxruntime
from tests.plugins.packed_linear.cases import CASES, SAMPLES, Case, inputs_of

NAMES = [case.name for case in CASES]
SAMPLE_ROWS = 3


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_name_says_everything(name: str) -> None:
    variant = parse(f"PackedLinear_{name}")
    assert isinstance(variant, PackedLinear)
    assert variant.op_type == f"PackedLinear_{name}"
    assert PackedLinear.parse(variant.op_type) == variant


def test_inputs_are_in_the_order_of_the_contract() -> None:
    variant = PackedLinear("e2m1", "fp8", "bf16", 64, 256, 128, "multipliers", True, True, True)
    assert variant.op_type == "PackedLinear_e2m1_fp8_bf16_n64_k256_g128m_bias_gelu_residual"
    assert dict(variant.input_types) == {
        "numbers": TensorProto.FLOAT8E4M3FN,
        "x_scales": TensorProto.FLOAT,
        "words": TensorProto.INT32,
        "weight_scales": TensorProto.FLOAT,
        "multipliers": TensorProto.INT8,
        "bias": TensorProto.FLOAT,
        "residual": TensorProto.BFLOAT16,
        "gate": TensorProto.BFLOAT16,
    }
    assert variant.output_types == {"y": TensorProto.BFLOAT16}
    assert tuple(PackedLinear("e2m1", "none", "fp16", 8, 64).input_types) == ("x", "words", "weight_scales")
    assert PackedLinear("e2m1", "fp16", "fp16", 8, 64).input_types["numbers"] == TensorProto.INT8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("e2m2", "int8", "fp16", 8, 64), UnknownFormatError, "unknown packed weight format 'e2m2'; did you mean 'e"),
        (("e4m3", "fp8", "fp16", 8, 64), UnknownFormatError, "unknown packed weight format 'e4m3'"),
        (("e2m1", "int4", "fp16", 8, 64), UnknownFormatError, "unknown container 'int4'; did you mean 'int8'"),
        (("e2m1", "int8", "fp8", 8, 64), UnknownFormatError, "unknown float type 'fp8'; valid: fp32, fp16, bf16"),
        (
            ("e3m2", "int8", "fp16", 8, 64),
            VariantError,
            "e3m2 has values that int8 does not hold; nearest container: fp8",
        ),
        (("e2m1", "int8", "fp16", 8, 64, 48, "scales"), GroupError, "nearest: 32"),
        (("e2m1", "int8", "fp16", 8, 64, 32), VariantError, "give both or neither"),
        (("e2m1", "int8", "fp16", 0, 64), VariantError, "at least one output feature"),
        (("e1m2", "int8", "fp16", 8, 9000, 100, "multipliers"), VariantError, "pass INT32; longest: 8387"),
    ],
)
def test_refuses_impossible_combinations(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PackedLinear(*arguments)


def test_fp8_needs_a_gpu_that_has_it() -> None:
    variant = PackedLinear("e2m1", "fp8", "fp16", 128, 128)
    with pytest.raises(VariantError, match=r"8\.7 has no fp8; nearest container: fp16"):
        variant.kernels((8, 7))
    assert variant.kernels((8, 9))


def test_longest_sum_does_not_pass_int32() -> None:
    """127 · 16·7 · 18 · 8387, the limit that the refusal names, fits; one more does not."""
    product = 127 * 16 * 7 * 18
    assert product * 8387 <= np.iinfo(np.int32).max < product * 8388


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.rows}x{case.tile.splits}")
def test_body_equals_the_reference(case: Case) -> None:
    variant = case.variant
    drawn = inputs_of(replace(case, rows=SAMPLES * SAMPLE_ROWS))
    tokens = {"x", "numbers", "x_scales", "residual"}
    inputs = {
        name: array.reshape(SAMPLES, SAMPLE_ROWS, -1) if name in tokens else array for name, array in drawn.items()
    }
    if "gate" in inputs:
        inputs["gate"] = inputs["gate"][:, None, :]
    expected = packed_linear(variant, inputs).astype(np.float64)
    assert expected.shape == (SAMPLES, SAMPLE_ROWS, variant.n)
    found = _run(variant, inputs)
    absolute = np.abs(expected) + np.abs(expected).max() * 2e-6
    tolerance = {"fp32": 1e-6, "fp16": 2.0**-10, "bf16": 2.0**-7}[variant.float_type]
    assert (np.abs(found - expected) <= tolerance * absolute + 2e-6 * np.abs(expected).max()).all()


@pytest.mark.parametrize(("weight", "container"), [("e2m1", INT8), ("e2m1", FP8), ("e2m3", INT8), ("e3m2", FP8)])
def test_reference_is_the_product_of_the_numbers(weight: str, container: object) -> None:
    """Numerators in INT8, values in floats: what the lowering folds powers of two for."""
    variant = PackedLinear(weight, container.name, "fp32", 8, 64)
    codes = np.flatnonzero(variant.format.valid)[np.arange(8 * 64) % variant.format.valid.sum()].astype(np.uint8)
    codes = codes.reshape(8, 64)
    numbers = np.eye(64)[:5].astype(container.dtype)
    ones = np.ones((8, 1), np.float32)
    inputs = {"numbers": numbers, "x_scales": ones[:5], "words": variant.layout.pack(codes), "weight_scales": ones}
    expected = variant.format.decode(codes).astype(np.float64) * factor(variant.format, container)
    np.testing.assert_array_equal(packed_linear(variant, inputs), expected[:, :5].T)


def _run(variant: PackedLinear, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """y of the body in ONNX Runtime, float64. BF16 and FP8, which numpy lacks, enter and leave through casts."""
    carried = (TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN)
    nodes, infos, feeds = [], [], {}
    for name, element in variant.input_types.items():
        outside = TensorProto.FLOAT if element in carried else element
        infos.append(helper.make_tensor_value_info(f"{name}_in", outside, [None] * inputs[name].ndim))
        nodes.append(helper.make_node("Cast", [f"{name}_in"], [name], to=element))
        feeds[f"{name}_in"] = inputs[name].astype(helper.tensor_dtype_to_np_dtype(outside))
    node = helper.make_node(variant.op_type, variant.input_names, variant.output_names, domain="fp4export")
    node.attribute.extend(helper.make_attribute(key, value) for key, value in variant.attributes("layer").items())
    nodes += [node, helper.make_node("Cast", ["y"], ["y_out"], to=TensorProto.FLOAT)]
    output = helper.make_tensor_value_info("y_out", TensorProto.FLOAT, [None] * 3)
    model = helper.make_model(
        helper.make_graph(nodes, "graph", infos, [output]),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("fp4export", 1)],
        functions=[variant.function(21)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return in_onnxruntime(model, feeds)[0].astype(np.float64)


def test_weights_alone_have_no_kernel_for_fp32() -> None:
    with pytest.raises(VariantError, match="weight-only layers take fp16 or bf16"):
        PackedLinear("e2m1", "none", "fp32", 8, 64).kernels((8, 7))
