"""What the quantizers' PTX must have and must not: conversions, rounding of each operation, wide loads and stores."""

from __future__ import annotations

import re

import pytest

from plugins.kernels.compile import CompiledKernel, compile_kernels
from plugins.kernels.hardware import HARDWARE, Capability
from plugins.op import GeluQuantize, NormQuantize, TokenQuantize

Kernels = dict[tuple[str, Capability], CompiledKernel]

DETAILED = ((8, 7), (9, 0))
CONVERSION = "cvt.rn.satfinite.e4m3x2.f32"


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """The default tactic of an operator for every GPU, and of others for two."""
    requests = []
    for capability, hardware in HARDWARE.items():
        container = "fp8" if hardware.has_fp8 else "fp16"
        variants: dict[str, TokenQuantize | GeluQuantize | NormQuantize] = {
            "token": TokenQuantize("e2m3", container, "fp16", 1152)
        }
        others: dict[str, TokenQuantize | GeluQuantize | NormQuantize] = {
            "integers": TokenQuantize("e2m3", "int8", "bf16", 1152),
            "gelu": GeluQuantize("e4m3", container, "bf16", 4608),
            "norm": NormQuantize("e2m3", container, "fp16", 1152),
        }
        if capability in DETAILED:
            variants |= others
        requests += [(name, variant.kernels(capability)[0], capability) for name, variant in variants.items()]
    compiled = compile_kernels([(spec, capability) for _, spec, capability in requests])
    return {(name, capability): kernel for (name, _, capability), kernel in zip(requests, compiled, strict=True)}


def test_e4m3_is_converted_by_hardware_where_there_is_any(
    kernels: dict[tuple[str, Capability], CompiledKernel],
) -> None:
    for (name, capability), kernel in kernels.items():
        wanted = name != "integers" and HARDWARE[capability].has_fp8
        assert (CONVERSION in kernel.ptx) == wanted, kernel.entry


def test_every_operation_rounds_by_itself(kernels: Kernels) -> None:
    for (name, _), kernel in kernels.items():
        assert not re.search(r"\b(add|sub|mul|fma|mad)(\.ftz)?\.f32", kernel.ptx), kernel.entry
        assert "div.rn.f32" in kernel.ptx
        if name != "gelu":
            assert ".ftz" not in kernel.ptx
            assert ".approx" not in kernel.ptx


def test_rows_stay_in_registers(kernels: Kernels) -> None:
    for kernel in kernels.values():
        assert kernel.resources.stack_bytes == kernel.resources.spill_store_bytes == 0
        assert kernel.shared_bytes <= 4 * kernel.spec.launch.num_warps
        assert "ld.global.v4.b32" in kernel.ptx
        assert "st.global.v2.b32" in kernel.ptx
