"""What Triton makes of the kernels for each GPU: the tensor cores' instruction, registers, spills and shared memory."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from plugins.kernels.compile import CompiledKernel, compile_kernels
from plugins.kernels.hardware import HARDWARE, Capability
from plugins.kernels.spec import KernelSpec
from plugins.packed_linear.descriptor import PackedLinear

# The tile of 32 tokens compiles fast, and its instruction is that of the larger ones.
PRODUCTS: Mapping[tuple[str, Capability], str] = {
    ("e2m1_int8_fp16", (8, 7)): "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    ("e2m1_int8_fp16", (8, 9)): "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    ("e2m1_int8_fp16", (9, 0)): "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8",
    ("e2m1_int8_fp16", (10, 0)): "tcgen05.mma.cta_group::1.kind::i8",
    ("e2m1_int8_fp16", (11, 0)): "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    ("e2m1_fp8_fp16", (8, 9)): "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
    ("e2m1_fp8_fp16", (9, 0)): "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3",
    ("e2m1_fp8_fp16", (11, 0)): "tcgen05.mma.cta_group::1.kind::f8f6f4",
    ("e2m1_fp8_fp16", (12, 0)): "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
    ("e2m1_fp16_fp16", (8, 7)): "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    ("e1m2_none_bf16", (9, 0)): "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16",
    ("e2m3_none_fp16", (8, 0)): "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
}
# Large tiles, and the epilogue that takes most registers.
DEMANDING: tuple[tuple[str, Capability], ...] = (
    ("e2m1_int8_fp32_n1151_k1152_g128m_bias_gelu_residual", (9, 0)),
    ("e2m1_int8_fp16_n1152_k1152_bias", (8, 7)),
    ("e2m1_fp16_fp16_n128_k256", (10, 0)),
)
FEW_TOKENS: tuple[tuple[str, Capability], ...] = (
    ("e2m1_int8_fp16_n1152_k4608_bias", (8, 7)),
    ("e3m2_fp8_bf16_n1152_k1152_residual", (9, 0)),
)


def specs(name: str, capability: Capability) -> tuple[KernelSpec, ...]:
    variant = PackedLinear.parse(f"PackedLinear_{name}")
    assert variant is not None
    return variant.kernels(capability)


def spec_of_32_tokens(name: str, capability: Capability) -> KernelSpec:
    candidates = specs(f"{name}_n256_k256", capability)
    return next(spec for spec in candidates if spec.constants["BLOCK_M"] == 32 and "SPLITS" not in spec.constants)


@pytest.fixture(scope="module")
def compiled() -> Mapping[str, CompiledKernel]:
    """Every kernel of the tests below by name, from one process."""
    requests = [
        *((spec_of_32_tokens(name, capability), capability) for name, capability in PRODUCTS),
        *((specs(name, capability)[0], capability) for name, capability in DEMANDING),
        *((specs(name, capability)[-1], capability) for name, capability in FEW_TOKENS),
    ]
    return {kernel.entry: kernel for kernel in compile_kernels(requests)}


@pytest.mark.parametrize(("name", "capability"), PRODUCTS, ids=str)
def test_tensor_cores_multiply_in_the_container(
    compiled: Mapping[str, CompiledKernel], name: str, capability: Capability
) -> None:
    ptx = compiled[spec_of_32_tokens(name, capability).name].ptx
    assert products_of(ptx) == {PRODUCTS[name, capability]}
    assert_nothing_is_stored_to_shared_memory(ptx)


def test_multipliers_reach_the_weights_without_a_detour(compiled: Mapping[str, CompiledKernel]) -> None:
    """As many channels as threads: where Triton would rather load the multipliers, and the weights with them, apart."""
    spec = specs(*DEMANDING[0])[0]
    ptx = compiled[spec.name].ptx
    assert spec.constants["PARTIAL"] == "folded"
    assert int(spec.constants["BLOCK_N"]) == 32 * spec.launch.num_warps
    assert products_of(ptx) == {"wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"}
    assert_nothing_is_stored_to_shared_memory(ptx)
    # One wait a step.
    assert ptx.count("wgmma.wait_group") == 1


def products_of(ptx: str) -> set[str]:
    return set(re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[.\w:]*", ptx))


def assert_nothing_is_stored_to_shared_memory(ptx: str) -> None:
    """Before the epilogue: weights are decoded where the tensor core reads them."""
    loop = ptx[: max(ptx.rindex(instruction) for instruction in products_of(ptx))]
    assert "st.shared" not in loop
    assert "stmatrix" not in loop


def test_none_spills(compiled: Mapping[str, CompiledKernel]) -> None:
    for name, kernel in compiled.items():
        assert (kernel.resources.spill_store_bytes, kernel.resources.stack_bytes) == (0, 0), name


@pytest.mark.parametrize("capability", HARDWARE, ids=str)
@pytest.mark.parametrize(
    "name", ["e2m1_int8_fp16_n1152_k1152_bias", "e2m3_none_bf16_n1408_k1408", "e3m0_fp16_fp32_n9_k70"]
)
def test_every_gpu_has_tactics_for_many_and_for_few_tokens(name: str, capability: Capability) -> None:
    kernels = specs(name, capability)
    assert {"SPLITS" in spec.constants for spec in kernels} == {True, False}
    assert len({spec.name for spec in kernels}) == len(kernels)
    for spec in kernels:
        assert spec.launch.columns * int(spec.constants["BLOCK_N"]) >= int(spec.constants["N"])
        assert spec.launch.rows_per_program == spec.constants["BLOCK_M"]
