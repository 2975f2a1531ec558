"""Plugins in TensorRT's real registry, driven as its builder drives them: types, shapes, tactics, launches, PTX."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plugins.kernels.compile import compile_library
from plugins.kernels.hardware import Capability
from plugins.kernels.library import KernelLibrary, LibraryKernel
from plugins.tensorrt_plugins.variant import PluginVariant, plugin_variant

CAPABILITY = (8, 7)
QUANTIZER = "TokenQuantize_e2m3_int8_fp16_k64"
# Operator → the shapes of its inputs, and what they make of it: rows and rows of a sample.
BATCH, TOKENS = 3, 50
OPERATORS: dict[str, tuple[list[list[int]], list[int]]] = {
    QUANTIZER: ([[BATCH, TOKENS, 64]], [BATCH * TOKENS]),
    "GeluQuantize_e4m3_fp8_bf16_k128": ([[BATCH, TOKENS, 128]], [BATCH * TOKENS]),
    "NormQuantize_e4m3_fp16_fp32_k64": (
        [[BATCH, TOKENS, 64], [BATCH, 1, 64], [BATCH, 1, 64]],
        [BATCH * TOKENS, TOKENS],
    ),
    "NormQuantize_e4m3_fp16_fp32_k64_shared": ([[BATCH, TOKENS, 64], [1, 1, 64], [1, 1, 64]], [BATCH * TOKENS]),
    "PackedLinear_e2m1_int8_fp16_n200_k256_g128m_bias": (
        [[BATCH, TOKENS, 256], [BATCH, TOKENS, 1], [200, 32], [200, 1], [200, 2], [200]],
        [BATCH * TOKENS],
    ),
    "PackedLinear_e2m1_none_bf16_n200_k256_g128s_gelu": (
        [[BATCH * TOKENS, 256], [200, 32], [200, 2]],
        [BATCH * TOKENS],
    ),
    "PackedLinear_e2m3_fp16_fp32_n200_k256_residual": (
        [[BATCH, TOKENS, 256], [BATCH, TOKENS, 1], [200, 48], [200, 1], [BATCH, TOKENS, 200], [BATCH, 1, 200]],
        [BATCH * TOKENS, TOKENS],
    ),
    "PackedLinear_e1m2_int8_fp32_n200_k256_residual": (
        [[BATCH, TOKENS, 256], [BATCH, TOKENS, 1], [200, 32], [200, 1], [BATCH, TOKENS, 200], [1, 1, 200]],
        [BATCH * TOKENS, BATCH * TOKENS],
    ),
}
NAMES = {1: "FLOAT", 10: "HALF", 16: "BF16", 3: "INT8", 6: "INT32", 17: "FP8"}


def described(variant: PluginVariant, capability: Capability) -> list[LibraryKernel]:
    """Kernels as they are described, with a word for their PTX."""
    return [
        LibraryKernel(
            op_type=variant.op_type,
            tactic=tactic,
            capability=capability,
            entry=spec.name,
            inputs=spec.inputs,
            scalars=spec.scalars,
            outputs=spec.outputs,
            launch=spec.launch,
            shared_bytes=1024 * tactic,
            ptx_version=85,
            ptx=f"// {spec.name}",
        )
        for tactic, spec in enumerate(variant.kernels(capability))
    ]


def capability_of(op_type: str) -> Capability:
    return (8, 9) if "_fp8_" in op_type else CAPABILITY


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    """Kernels of all the operators, those of the quantizer really compiled."""
    compiled = compile_library([plugin_variant(QUANTIZER)], [CAPABILITY])
    others = [plugin_variant(name) for name in OPERATORS if name != QUANTIZER]
    made = [kernel for variant in others for kernel in described(variant, capability_of(variant.op_type))]
    return KernelLibrary((*compiled.kernels, *made), compiled.compiler)


@pytest.fixture(scope="module")
def driven(library: KernelLibrary, in_tensorrt: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What TensorRT learns of every operator."""
    folder = tmp_path_factory.mktemp("driven") / "graph.kernels"
    library.save(folder)
    results: dict[str, Any] = {}
    for capability in {capability_of(name) for name in OPERATORS}:
        names = {name: shapes for name, (shapes, _) in OPERATORS.items() if capability_of(name) == capability}
        job = {"library": str(folder), "capability": capability, "inputs": names}
        results |= in_tensorrt(job)
    return results


@pytest.mark.parametrize("op_type", OPERATORS)
def test_creators_types_and_shapes(op_type: str, driven: Any) -> None:
    variant, found = plugin_variant(op_type), driven[op_type]
    assert found["creator"] == [op_type, "1", "fp4export"]
    # The parser passes only what a creator names, so a node's attributes reach no plugin.
    assert found["fields"] == []
    assert found["aot"]
    assert found["output_types"] == [NAMES[element] for element in variant.output_types.values()]
    leading = OPERATORS[op_type][0][0][:-1]
    assert found["output_shapes"] == [[*leading, width] for width in variant.output_widths]
    elements = (*variant.input_types.values(), *variant.output_types.values())
    assert found["supported"] == [[NAMES[element], "LINEAR"] for element in elements]


@pytest.mark.parametrize("op_type", OPERATORS)
def test_every_tactic_launches_its_kernel(op_type: str, driven: Any, library: KernelLibrary) -> None:
    kernels = library.tactics(op_type, capability_of(op_type))
    scalars = OPERATORS[op_type][1]
    assert list(driven[op_type]["tactics"]) == [str(number) for number in range(1, len(kernels) + 1)]
    for kernel, found in zip(kernels, driven[op_type]["tactics"].values(), strict=True):
        assert (found["kernel"], found["ptx"]) == (kernel.entry, kernel.ptx)
        assert found["scalars"] == scalars
        assert found["parameters"] == {
            "grid_x": kernel.launch.programs(scalars[0]),
            "grid_y": 1,
            "grid_z": 1,
            "block_x": 32 * kernel.launch.num_warps,
            "block_y": 1,
            "block_z": 1,
            "shared_mem": kernel.shared_bytes,
        }


@pytest.mark.parametrize("op_type", OPERATORS)
def test_kernels_take_what_tensorrt_passes(op_type: str, library: KernelLibrary) -> None:
    """Pointers of inputs, integers, pointers of outputs, in the order and number of the operator's tensors."""
    variant = plugin_variant(op_type)
    for kernel in library.tactics(op_type, capability_of(op_type)):
        assert tuple(pointer.name for pointer in kernel.inputs) == variant.input_names
        assert tuple(pointer.name for pointer in kernel.outputs) == variant.output_names
        assert len(kernel.scalars) == len(OPERATORS[op_type][1])


@pytest.mark.parametrize(
    ("inputs", "capability", "message"),
    [
        (["FloatQuantizeOnline_e2m3"], CAPABILITY, "without kernels"),
        ([QUANTIZER], (9, 0), r"no kernel of .* for compute capability 9\.0"),
        ([QUANTIZER, QUANTIZER.replace("64", "72")], CAPABILITY, "no kernel of .*k72"),
    ],
)
def test_what_cannot_be_registered_leaves_the_registry_alone(
    inputs: list[str], capability: Capability, message: str, library: KernelLibrary, in_tensorrt: Any, tmp_path: Path
) -> None:
    library.save(tmp_path / "k.kernels")
    job = {"library": str(tmp_path / "k.kernels"), "capability": capability, "refused": inputs}
    error, registered = in_tensorrt(job)
    assert re.search(message, error)
    assert registered == []


def test_registered_twice(library: KernelLibrary, in_tensorrt: Any, tmp_path: Path) -> None:
    library.save(tmp_path / "k.kernels")
    job = {"library": str(tmp_path / "k.kernels"), "capability": CAPABILITY, "refused": [QUANTIZER], "twice": True}
    error, registered = in_tensorrt(job)
    assert "registered already" in error
    assert registered == [QUANTIZER]


def test_older_tensorrt_is_told_what_is_offered_instead(
    library: KernelLibrary, in_tensorrt: Any, tmp_path: Path
) -> None:
    library.save(tmp_path / "k.kernels")
    job = {
        "library": str(tmp_path / "k.kernels"),
        "capability": CAPABILITY,
        "refused": [QUANTIZER],
        "version": "10.3.0.26",
    }
    error, registered = in_tensorrt(job)
    assert "TensorRT 10.3.0.26 has no plugins" in error
    assert "kernels: native" in error
    assert registered == []
