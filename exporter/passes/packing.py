"""Codes in words."""

from __future__ import annotations

from dataclasses import replace

import onnx_graphsurgeon as gs

from exporter.passes.surgery import array_of, variant_of
from exporter.targets import Target
from plugins.formats import get_format
from plugins.op import DequantizeWeight, Gemm
from plugins.packing import PACKED_BITS, pack


def pack_weights(graph: gs.Graph, target: Target) -> int:
    """FloatGemm(…, codes u8 [N, K], …) → FloatGemm_packed(…, words i32 [N, W], …); FloatDequantize_w likewise.

    When the codes are constants of a width that is packed. Layers that share their codes share the words.
    """
    words: dict[str, gs.Constant] = {}
    changed = 0
    for node in graph.nodes:
        found = variant_of(node, Gemm) or variant_of(node, DequantizeWeight)
        if found is None or found.packed:
            continue
        fmt = get_format(found.weight_format if isinstance(found, Gemm) else found.format)
        index = found.input_names.index("codes")
        stored = node.inputs[index]
        codes = array_of(stored)
        if codes is None or fmt.bits not in PACKED_BITS:
            continue
        if stored.name not in words:
            name = f"{stored.name.removesuffix('.codes')}.words"
            words[stored.name] = gs.Constant(name, pack(codes, fmt.bits))
        node.inputs[index] = words[stored.name]
        node.op = replace(found, packed=True).op_type
        node.attrs["packed"] = 1
        changed += 1
    return changed
