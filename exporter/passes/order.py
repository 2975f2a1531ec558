"""Which passes must have run before another one, because it looks for what they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

NEEDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "merge_transposes": ("fold_shapes",),
        "fold_attention_scale": ("merge_transposes",),
        "drop_broadcast_expands": ("drop_noops",),
        "fold_scales": ("fuse_linear",),
        "choose_containers": ("fuse_linear", "fold_scales"),
        "compute_in_fp16": ("fuse_linear",),
        "compute_in_bf16": ("fuse_linear",),
        "lower_to_cpu": ("choose_containers", "pack_weights"),
        "fuse_attention": ("merge_transposes",),
        "multiply_in_fp16": ("lower_to_tensorrt",),
        "lower_to_tensorrt": ("choose_containers", "pack_weights"),
        "lower_to_plugins": ("choose_containers", "pack_weights", "separate_containers"),
        "fuse_norm_quantize": ("lower_to_plugins",),
        "fuse_gelu_quantize": ("lower_to_plugins",),
        "fuse_gelu_epilogue": ("lower_to_plugins", "fuse_gelu_quantize"),
        "fuse_residual": ("lower_to_plugins", "fuse_gelu_epilogue"),
        "plugins_in_fp16": ("compute_in_fp16", "fuse_residual"),
        "plugins_in_bf16": ("compute_in_bf16", "fuse_residual"),
    }
)
"""Pass → passes that come before it, in the same run or in one whose result this graph is.

Asked of graphs with operators of the project only: on any other there is nothing that a pass could miss.
"""


class PassOrderError(ValueError):
    """A pass was asked for before one that it needs."""


def check_order(name: str, done: Sequence[str]) -> None:
    """Raise `PassOrderError` if pass `name` needs one that is not among those `done`."""
    missing = [needed for needed in NEEDS.get(name, ()) if needed not in done]
    if missing:
        raise PassOrderError(f"pass {name} needs {missing[0]} to have run before it; put it first in the tuple")
