"""Which nodes are plugins: operators that have kernels of ours."""

from __future__ import annotations

from typing import TypeAlias

import onnx_graphsurgeon as gs

from plugins.op import GeluQuantize, NormQuantize, PackedLinear, TokenQuantize, is_ours, parse

KernelOperator: TypeAlias = GeluQuantize | NormQuantize | PackedLinear | TokenQuantize


def kernel_of(node: gs.Node) -> KernelOperator | None:
    """The operator of a node that is a plugin; None for every other node."""
    variant = parse(node.op) if is_ours(node) else None
    return variant if isinstance(variant, GeluQuantize | NormQuantize | PackedLinear | TokenQuantize) else None
