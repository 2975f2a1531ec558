"""Graph passes: functions `(graph, target) -> places changed`, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from exporter.compute import Compute
from exporter.passes.attention import drop_broadcast_expands, fold_attention_scale
from exporter.passes.boundaries import name_boundaries
from exporter.passes.choose import choose_containers
from exporter.passes.compute_type import compute_in_bf16, compute_in_fp16
from exporter.passes.constants import fold_constants
from exporter.passes.driver import Keep, Pass, run_passes
from exporter.passes.fold import fold_scales
from exporter.passes.fuse import fuse_linear
from exporter.passes.fused_attention import fuse_attention
from exporter.passes.gelu import spell_out_gelu
from exporter.passes.half import store_exactly_in_half
from exporter.passes.half_products import multiply_in_fp16
from exporter.passes.history import PassResult
from exporter.passes.lower_cpu import lower_to_cpu
from exporter.passes.lower_plugins import lower_to_plugins
from exporter.passes.lower_tensorrt import lower_to_tensorrt
from exporter.passes.modulation import fold_modulation_offsets
from exporter.passes.noops import drop_noops
from exporter.passes.packing import pack_weights
from exporter.passes.plugins.compute_type import plugins_in_bf16, plugins_in_fp16
from exporter.passes.plugins.epilogues import fuse_gelu_epilogue, fuse_residual
from exporter.passes.plugins.quantizers import fuse_gelu_quantize, fuse_norm_quantize
from exporter.passes.plugins.separate import separate_containers
from exporter.passes.refuse import refuse_unsupported
from exporter.passes.shapes import fold_shapes
from exporter.passes.sharing import share_activation_quantizers
from exporter.passes.slices import forward_slices_of_concats
from exporter.passes.squeezes import drop_noop_squeezes
from exporter.passes.tiling import tile_feed_forward
from exporter.passes.transposes import merge_transposes
from exporter.targets import Target

__all__ = [
    "COMPUTE_PASSES",
    "CPU_PASSES",
    "HALF_PRODUCT_PASSES",
    "PLUGIN_COMPUTE_PASSES",
    "PLUGIN_PASSES",
    "TENSORRT_PASSES",
    "WAIST_PASSES",
    "Keep",
    "Pass",
    "PassResult",
    "lowering_passes",
    "run_passes",
]

WAIST_PASSES: tuple[Pass, ...] = (
    drop_noop_squeezes,
    fold_constants,
    fold_shapes,
    merge_transposes,
    forward_slices_of_concats,
    drop_noops,
    drop_broadcast_expands,
    fold_attention_scale,
    fold_modulation_offsets,
    name_boundaries,
    share_activation_quantizers,
    fuse_linear,
    fold_scales,
    choose_containers,
    pack_weights,
    store_exactly_in_half,
)
CPU_PASSES: tuple[Pass, ...] = (lower_to_cpu, fuse_attention, tile_feed_forward, refuse_unsupported)
TENSORRT_PASSES: tuple[Pass, ...] = (lower_to_tensorrt, spell_out_gelu, refuse_unsupported)
# Where the builder has no products with FP32 results.
HALF_PRODUCT_PASSES: tuple[Pass, ...] = (lower_to_tensorrt, multiply_in_fp16, spell_out_gelu, refuse_unsupported)

# Before the lowering, because there a quantized linear is still one node.
COMPUTE_PASSES: Mapping[Compute, tuple[Pass, ...]] = MappingProxyType(
    {"fp32": (), "fp16": (compute_in_fp16,), "bf16": (compute_in_bf16,)}
)

# The fusions come first, on FP32, and what has no kernel of ours is lowered as without plugins.
PLUGIN_PASSES: tuple[Pass, ...] = (
    separate_containers,
    lower_to_plugins,
    fuse_norm_quantize,
    fuse_gelu_quantize,
    fuse_gelu_epilogue,
    fuse_residual,
)
PLUGIN_COMPUTE_PASSES: Mapping[Compute, tuple[Pass, ...]] = MappingProxyType(
    {"fp32": (), "fp16": (plugins_in_fp16,), "bf16": (plugins_in_bf16,)}
)


def lowering_passes(target: Target, compute: Compute = "fp32") -> tuple[Pass, ...]:
    """The passes that turn the waist into the target's own operators, other than linears in the compute type."""
    if target.kernels == "plugin":
        return (*PLUGIN_PASSES, *COMPUTE_PASSES[compute], *PLUGIN_COMPUTE_PASSES[compute], *TENSORRT_PASSES)
    if target.engine != "onnxruntime":
        passes = TENSORRT_PASSES if target.fp32_products else HALF_PRODUCT_PASSES
        return (*COMPUTE_PASSES[compute], *passes)
    return CPU_PASSES
