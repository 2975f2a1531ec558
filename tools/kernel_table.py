"""Write docs/kernels.md's table: every kernel of the shipped models' shapes, compiled for every GPU.

`python -m tools.kernel_table` compiles the representative operators (some minutes) and rewrites the table between the
two markers; with `--check` it writes nothing and exits with 1 if the page has another table. Operators given by name
(`python -m tools.kernel_table TokenQuantize_e2m3_int8_fp16_k1152`) are printed instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

from exporter.files import write_text_atomically
from plugins.kernels.compile import CompiledKernel, KernelVariant, compile_kernels
from plugins.kernels.hardware import HARDWARE, Capability, Hardware, hardware_of
from plugins.kernels.spec import KernelSpec
from plugins.op import parse

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
START, END = "<!-- kernels: written by tools/kernel_table.py -->", "<!-- end of kernels -->"

OPERATORS = (
    "TokenQuantize_e2m3_int8_fp16_k1152",
    "TokenQuantize_e2m3_{fp8}_fp16_k1152",
    "TokenQuantize_e4m3_{fp8}_bf16_k1408",
    "GeluQuantize_e2m3_int8_fp16_k4608",
    "GeluQuantize_e4m3_{fp8}_bf16_k5632",
    "NormQuantize_e2m3_int8_fp16_k1152",
    "NormQuantize_e2m3_{fp8}_fp16_k1152",
    "NormQuantize_e4m3_{fp8}_bf16_k1408_shared",
    "PackedLinear_e2m1_int8_fp16_n1152_k4608_g128m_bias_residual",
    "PackedLinear_e2m1_{fp8}_fp16_n4608_k1152_bias_gelu",
    "PackedLinear_e2m3_{fp8}_bf16_n1408_k5632_bias",
)
"""PixArt's and Hunyuan-DiT's shapes; {fp8} is the container that a GPU has for E4M3. Of the linear: INT8 with groups
and a residual, floats' products with GELU, 6 bits."""


def variants(op_types: Iterable[str], hardware: Hardware) -> list[KernelVariant]:
    """The operators of these names, as they are for a GPU. Raises ValueError for one that has no kernels."""
    found: list[KernelVariant] = []
    for op_type in op_types:
        variant = parse(op_type.format(fp8="fp8" if hardware.has_fp8 else "fp16"))
        if not hasattr(variant, "kernels"):
            raise ValueError(f"{op_type} has no kernels")
        found.append(cast(KernelVariant, variant))
    return found


def described(op_types: Iterable[str], capabilities: Iterable[Capability]) -> list[tuple[str, KernelSpec, Capability]]:
    """Every tactic of every operator for every capability, with the operator's name."""
    return [
        (variant.op_type, spec, capability)
        for capability in capabilities
        for variant in variants(op_types, hardware_of(capability))
        for spec in variant.kernels(capability)
    ]


def compiled(op_types: Sequence[str], capabilities: Sequence[Capability]) -> list[tuple[str, CompiledKernel]]:
    """All that is described, compiled in as many processes as there are cores."""
    requests = described(op_types, capabilities)
    processes = os.cpu_count() or 1
    shares = [requests[first::processes] for first in range(processes)]
    with ThreadPoolExecutor(processes) as threads:
        return [entry for entries in threads.map(_compiled, shares) for entry in entries]


def _compiled(requests: Sequence[tuple[str, KernelSpec, Capability]]) -> list[tuple[str, CompiledKernel]]:
    kernels = compile_kernels([(spec, capability) for _, spec, capability in requests])
    return [(op_type, kernel) for (op_type, _, _), kernel in zip(requests, kernels, strict=True)]


def table(kernels: Iterable[tuple[str, CompiledKernel]]) -> str:
    """One row per kernel."""
    lines = [
        "| operator | GPU | tactic | warps | registers | spilled bytes | shared bytes | PTX bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for op_type, kernel in sorted(kernels, key=lambda entry: (entry[0], entry[1].capability, entry[1].entry)):
        spilled = kernel.resources.spill_store_bytes + kernel.resources.spill_load_bytes
        tactic = kernel.entry.rpartition("_t")[2]
        gpu = hardware_of(kernel.capability).architecture
        lines.append(
            f"| `{op_type}` | {gpu} | {tactic} | {kernel.spec.launch.num_warps} "
            f"| {kernel.resources.registers} | {spilled} | {kernel.shared_bytes} | {len(kernel.ptx)} |"
        )
    return "\n".join(lines)


def with_table(page: str, text: str) -> str:
    """The page with the table between its markers."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n{text}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Compile, and write, compare or print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("operators", nargs="*", help="op_types to compile and print instead of rewriting the page")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page's table is not what is compiled")
    options = parser.parse_args()
    if options.operators:
        print(table(compiled(options.operators, tuple(HARDWARE))))
        return 0
    text = table(compiled(OPERATORS, tuple(HARDWARE)))
    page = PAGE.read_text(encoding="utf-8")
    new = with_table(page, text)
    if options.check:
        if new != page:
            print(f"{PAGE}: its table is not this source's; run python -m tools.kernel_table", file=sys.stderr)
        return int(new != page)
    write_text_atomically(PAGE, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
