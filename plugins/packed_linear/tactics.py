"""Tiles of the packed linear, by GPU and operand type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from plugins.kernels.hardware import MAX_SHARED_BYTES, WARP_SIZE, Capability, hardware_of
from plugins.kernels.spec import Constant, KernelSpec, Launch, Pointer
from plugins.packed_linear.asm import decoder, e4m3_to_half
from plugins.packed_linear.encoding import Element
from plugins.packed_linear.layout import MAX_TILE

if TYPE_CHECKING:
    from plugins.packed_linear.descriptor import PackedLinear

_MODULE = "plugins.packed_linear.kernel"
_POINTERS: Mapping[str, str] = MappingProxyType(
    {"words": "i32", "x_scales": "fp32", "weight_scales": "fp32", "multipliers": "i8", "bias": "fp32"}
)
_NUMBERS: Mapping[str, str] = MappingProxyType({"int8": "i8", "fp8": "fp8e4nv", "fp16": "i8"})
_OPTIONAL = ("x_scales", "multipliers", "bias", "residual", "gate")
_E4M3_BYTES_EXPONENT = 8
"""`asm.e4m3_to_half` gives 2^-8 times the value."""


@dataclass(frozen=True)
class Tile:
    """What one program computes: `tokens` × `channels` results.

    A step multiplies a layout tile's 128 weights of each row, or a `steps`-th of them. With `splits` K is shared out
    among groups of warps, which each take a tile a step.
    """

    tokens: int
    channels: int
    num_warps: int
    num_stages: int
    steps: int = 1
    splits: int = 1


# Few channels a program and many tiles in flight, for up to 16 and 32 tokens.
_FEW_TOKENS = (
    Tile(16, 16, 4, 4, splits=4),
    Tile(16, 16, 8, 3, splits=8),
    Tile(32, 16, 4, 3, splits=4),
)
# mma.sync: every warp reads all tokens from shared memory, so four warps of 32 channels read half of what eight do.
_SYNCHRONOUS = (
    Tile(128, 128, 4, 4, steps=2),
    Tile(128, 128, 8, 4, steps=2),
    Tile(64, 64, 4, 4, steps=2),
    Tile(32, 64, 4, 4),
    *_FEW_TOKENS,
)
# wgmma of 8-bit numbers. Triton waits for each product that sums integers, and for those of each group, so that while
# one program waits, another on the same multiprocessor has to decode: by registers two fit of 128 × 128, three or four
# of the smaller ones. With many tokens an H100 is fastest with the first of each list at all measured shapes.
_WGMMA_INT8 = (
    Tile(64, 128, 4, 3),
    Tile(128, 128, 4, 4, steps=2),
    Tile(128, 128, 8, 4, steps=2),
    Tile(128, 256, 8, 3, steps=2),
    Tile(128, 64, 4, 4, steps=2),
    Tile(32, 64, 4, 4),
    *_FEW_TOKENS,
)
_WGMMA_FP8 = (
    Tile(64, 64, 4, 4),
    Tile(64, 128, 4, 3),
    Tile(128, 64, 4, 4, steps=2),
    Tile(128, 128, 8, 4, steps=2),
    Tile(32, 64, 4, 4),
    *_FEW_TOKENS,
)
# wgmma of 16-bit numbers, and tcgen05: while one group of four warps multiplies, the others decode.
_ASYNCHRONOUS = (
    Tile(128, 128, 8, 4, steps=2),
    Tile(128, 256, 8, 3, steps=2),
    Tile(64, 128, 4, 4, steps=2),
    Tile(32, 64, 4, 4),
    *_FEW_TOKENS,
)
# 6-bit codes take whole tiles a step.
_SIX_BITS = (
    Tile(64, 128, 8, 3),
    Tile(64, 64, 4, 3),
    Tile(32, 64, 4, 4),
    *_FEW_TOKENS,
)
_LEAST_STAGES = 3
"""With two, a step's loads would start when the step before has ended."""
_MAX_ACCUMULATORS = 128
"""Registers of a thread for sums, of 255."""
_HOPPER = 9
_FOLDED = "folded"
"""The multipliers are in the decoded weights, so that all of K is one sum."""
_BARRIER_BYTES = 64
_BAND = 8
_STORED_BY_A_WARP = 512
"""Results that a warp scales and stores at a time: 16 a thread, whose addresses leave room for those that wait."""


def kernels(variant: PackedLinear, capability: Capability) -> tuple[KernelSpec, ...]:
    """One kernel per tactic, best default first. Raises UnknownCapabilityError."""
    label = hardware_of(capability).label
    tiles = tiles_for(variant, capability)
    return tuple(kernel(variant, tile, f"{label}_t{tactic}", capability) for tactic, tile in enumerate(tiles))


def tiles_for(variant: PackedLinear, capability: Capability) -> tuple[Tile, ...]:
    """The tiles whose sums fit the registers and whose buffers fit 48 KiB, with as many stages as do."""
    is_asynchronous = multiplies_asynchronously(variant.element, capability)
    fitting = []
    for tile in _candidates(variant, capability):
        copies = 1 if _partial(variant, tile, capability) in ("", _FOLDED) else 2
        if copies * tile.tokens * tile.channels > _MAX_ACCUMULATORS * WARP_SIZE * tile.num_warps:
            continue
        for num_stages in range(tile.num_stages, _LEAST_STAGES - 1, -1):
            staged = replace(tile, num_stages=num_stages, steps=_steps(variant, tile))
            if _shared_bytes(variant, staged, is_asynchronous) <= MAX_SHARED_BYTES:
                fitting.append(staged)
                break
    return tuple(fitting)


def _candidates(variant: PackedLinear, capability: Capability) -> tuple[Tile, ...]:
    if variant.layout.high_plane:
        return _SIX_BITS
    if not multiplies_asynchronously(variant.element, capability):
        return _SYNCHRONOUS
    if capability[0] == _HOPPER:
        return {Element.INT8: _WGMMA_INT8, Element.FP8: _WGMMA_FP8}.get(variant.element, _ASYNCHRONOUS)
    return _ASYNCHRONOUS


def multiplies_asynchronously(element: Element, capability: Capability) -> bool:
    """Whether Triton uses wgmma (Hopper) or tcgen05 (Blackwell): on Thor not for INT8, on GeForce not at all."""
    return capability[0] in (_HOPPER, 10) or (capability[0] == 11 and element is not Element.INT8)


def _steps(variant: PackedLinear, tile: Tile) -> int:
    """Operands have at least 32 weights a row, which half of a small tile and a quarter of one of 6-bit codes are."""
    return tile.steps if variant.layout.tile == MAX_TILE and not variant.layout.high_plane else 1


def _shared_bytes(variant: PackedLinear, tile: Tile, is_asynchronous: bool) -> int:
    """Triton's buffers. Asynchronous products read x from shared memory until they end: one more of those.

    E4M3 bytes are decoded from there to there, half of a step at a time, as FP16 of twice the size.
    """
    width = variant.layout.tile * tile.splits // tile.steps
    x = tile.tokens * width * (1 if variant.is_quantized else 2)
    words = tile.channels * width * variant.format.bits // 8
    if is_asynchronous and tile.splits == 1:
        decoded = x if _decodes_x(variant) else 0
        return tile.num_stages * x + (tile.num_stages - 1) * words + decoded + _BARRIER_BYTES
    return (tile.num_stages - 1) * (x + words)


def kernel(variant: PackedLinear, tile: Tile, suffix: str, capability: Capability) -> KernelSpec:
    """The kernel of one tile, named by the operator and `suffix`."""
    floats = variant.float_type
    first = _NUMBERS.get(variant.container, floats)
    elements = {**_POINTERS, "x": first, "numbers": first, "residual": floats, "gate": floats}
    residual = variant.has_residual
    return KernelSpec(
        name=f"{variant.op_type}_{suffix}",
        source=f"{_MODULE}:packed_linear" + ("_split" if tile.splits > 1 else ""),
        inputs=tuple(Pointer(name, elements[name]) for name in variant.input_names),
        scalars=("rows", "rows_per_sample") if residual else ("rows",),
        outputs=(Pointer("y", floats),),
        constants=_constants(variant, tile, capability),
        launch=Launch(tile.tokens, -(-variant.n // tile.channels), tile.num_warps),
        num_stages=tile.num_stages,
    )


def _constants(variant: PackedLinear, tile: Tile, capability: Capability) -> dict[str, Constant]:
    encoding, layout = variant.encoding, variant.layout
    six_bits = layout.high_plane > 0
    absent = [name for name in _OPTIONAL if name not in variant.input_names]
    return {
        **dict.fromkeys(absent),
        **({} if variant.has_residual else {"rows_per_sample": None}),
        "N": variant.n,
        "K": variant.k,
        "ROW_BYTES": 4 * layout.words,
        "HIGH_PLANE": layout.high_plane,
        "TILE": layout.tile,
        "CHUNK": layout.chunk,
        "GROUP_TILES": variant.group_size // layout.chunk,
        "PARTIAL": _partial(variant, tile, capability),
        "GELU": variant.has_gelu,
        "ELEMENT": encoding.element.value,
        "EXPONENT_BITS": encoding.exponent_bits,
        "MANTISSA_BITS": encoding.mantissa_bits,
        "TWOS_COMPLEMENT": encoding.twos_complement,
        "UNIT": encoding.unit,
        "FACTOR": encoding.factor * (2.0**_E4M3_BYTES_EXPONENT if _decodes_x(variant) else 1.0),
        "ASM": decoder(encoding, folded=_partial(variant, tile, capability) == _FOLDED),
        "ASM_ODD": decoder(encoding, 1) if six_bits else "",
        "ASM_X": e4m3_to_half() if _decodes_x(variant) else "",
        "BLOCK_M": tile.tokens,
        "BLOCK_N": tile.channels,
        "PIECE": _STORED_BY_A_WARP * tile.num_warps,
        **({"SPLITS": tile.splits} if tile.splits > 1 else _whole_sums(variant, tile, capability)),
    }


def _whole_sums(variant: PackedLinear, tile: Tile, capability: Capability) -> dict[str, Constant]:
    """Constants of the kernel that does not share out K.

    Triton's layouts decide: where tcgen05 has weights in tensor memory, multipliers in two halves, or both halves of
    octets in one product, would make it move the weights through shared memory.
    """
    is_hopper = capability[0] == _HOPPER
    has_registers = is_hopper or not multiplies_asynchronously(variant.element, capability)
    return {
        "STEPS": _steps(variant, tile),
        "BAND": _BAND,
        "IN_HALVES": has_registers and tile.channels >= WARP_SIZE * tile.num_warps,
        "JOINED": is_hopper,
    }


def _decodes_x(variant: PackedLinear) -> bool:
    """Whether activations come as E4M3 bytes for FP16 products."""
    return variant.is_quantized and variant.element is Element.FP16


def _partial(variant: PackedLinear, tile: Tile, capability: Capability) -> str:
    """What is done with a step's sums before they are added to the others, or with multipliers instead.

    INT8 holds every product of a multiplier and a numerator, so there they are multiplied while weights are decoded:
    by the tables of the 4-bit formats that have any. Evenly spaced formats are 16 times their numbers when decoded,
    which leaves no room, and 6-bit codes are computed. Hopper's FP8 tensor cores add with about 14 bits, so there each
    step's sums are promoted to FP32 registers; left in the accumulator, the error of long sums would grow with K. Split
    kernels multiply FP8 as FP16, which needs no such.
    """
    encoding = variant.encoding
    has_tables = variant.element is Element.INT8 and not encoding.twos_complement and not variant.layout.high_plane
    if variant.group_factors == "multipliers" and has_tables:
        return _FOLDED
    if variant.group_factors:
        return variant.group_factors
    return "promote" if variant.element is Element.FP8 and capability[0] == _HOPPER and tile.splits == 1 else ""
