"""Rows that stress quantizers, and how their outputs are compared."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper

from plugins.domain import BODY_OPSET, DOMAIN
from plugins.formats import ACTIVATION_FORMATS, Format, get_format
from plugins.op import attach_functions
from plugins.token_quantize.reference import ContainerError, Numbers, number_factor
from plugins.token_quantize.variant import QuantizerVariant
from tests.plugins.triton_interpreter import TritonInterpreter

DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


def fits(fmt: str, container: str) -> bool:
    try:
        number_factor(get_format(fmt), container)
    except ContainerError:
        return False
    return True


PAIRS = [
    (fmt, container) for fmt in ACTIVATION_FORMATS for container in ("int8", "fp8", "fp16") if fits(fmt, container)
]


def turning_points(fmt: Format) -> npt.NDArray[np.float32]:
    """Every value, every midpoint, both neighbours of each, negative too; the largest is first, so the scale is 1."""
    values = np.unique(np.abs(fmt.values[fmt.valid]).astype(np.float64))
    points = np.concatenate([values, (values[:-1] + values[1:]) / 2]).astype(np.float32)
    near = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))])
    near = near[near <= fmt.max]
    return np.concatenate([[np.float32(fmt.max)], near, -near]).astype(np.float32)


def extreme_rows(k: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Zeros, subnormal numbers, one large number among small ones, the largest numbers of the type, heavy tails."""
    generator = np.random.default_rng(k)
    limits = ml_dtypes.finfo(dtype)
    random = generator.standard_t(3, (5, k))
    lonely = random[1] * 1e-3
    lonely[k // 2] = 1000
    largest = random[2] / np.abs(random[2]).max() * float(limits.max)
    tiny = np.rint(random[3]) * float(limits.smallest_subnormal)
    return np.stack([np.zeros(k), tiny, lonely, largest, random[4]]).astype(np.float32).astype(dtype)


def run_kernel(
    interpreter: TritonInterpreter, variant: QuantizerVariant, *inputs: npt.NDArray[Any], tactic: int = 0
) -> tuple[Numbers, npt.NDArray[np.float32]]:
    """Numbers and scales as the kernel leaves them, without the instructions that the interpreter lacks."""
    leading = inputs[0].shape[:-1]
    scalars = {"rows": int(np.prod(leading)), "rows_per_sample": leading[-1]}
    # What is not written stays recognisable.
    outputs = {
        "numbers": np.full((*leading, variant.k), 0x55, np.int8),
        "scales": np.full((*leading, 1), -1, np.float32),
    }
    named = dict(zip(variant.input_names, inputs, strict=True))
    spec = variant.kernels((9, 0))[tactic]
    left = interpreter.run(spec, named, scalars, outputs, FUSED=False, CONVERTS=False)
    return left["numbers"], left["scales"]


def run_body(variant: QuantizerVariant, *inputs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """What the function body gives in ONNX Runtime, E4M3 as bytes. The model casts float32 to the variant's type."""
    casts = [
        helper.make_node("Cast", [f"{name}.float32"], [name], to=element, name=f"{name}.cast")
        for name, element in variant.input_types.items()
    ]
    node = helper.make_node(variant.op_type, variant.input_names, variant.output_names, domain=DOMAIN, name="node")
    node.attribute.extend(helper.make_attribute(key, value) for key, value in variant.attributes("layer").items())
    named = {
        f"{name}.float32": array.astype(np.float32) for name, array in zip(variant.input_names, inputs, strict=True)
    }
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in named.items()]
    shape = [f"axis_{axis}" for axis in range(inputs[0].ndim)]
    outputs = [helper.make_tensor_value_info(name, element, shape) for name, element in variant.output_types.items()]
    graph = helper.make_graph([*casts, node], "graph", infos, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", BODY_OPSET)], ir_version=10)
    attach_functions(model)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, named))


def same_bytes(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def differing(
    numbers: Numbers, expected: Numbers, quotients: npt.NDArray[np.float32], fmt: Format, tolerance: float = 2e-6
) -> int:
    """How many numbers differ where the quotient is not within `tolerance` of the row's largest to a midpoint."""
    values = np.unique(fmt.values[fmt.valid]).astype(np.float64)
    midpoints = (values[:-1] + values[1:]) / 2
    nearest = np.abs(quotients[..., None].astype(np.float64) - midpoints).min(axis=-1)
    certain = nearest > tolerance * fmt.max
    assert certain.mean() > 0.9
    differs = np.asarray(numbers).view(np.int8) != np.asarray(expected).view(np.int8)
    return int((differs & certain).sum())
