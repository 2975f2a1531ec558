"""Graph passes: functions `(graph, target) -> places changed`, in the order in which they run."""

from __future__ import annotations

from exporter.passes.boundaries import name_boundaries
from exporter.passes.choose import choose_containers
from exporter.passes.driver import Keep, Pass, PassResult, run_passes
from exporter.passes.fold import fold_scales
from exporter.passes.fuse import fuse_linear
from exporter.passes.gelu import spell_out_gelu
from exporter.passes.half import store_exactly_in_half
from exporter.passes.lower_cpu import lower_to_cpu
from exporter.passes.lower_tensorrt import lower_to_tensorrt
from exporter.passes.packing import pack_weights
from exporter.passes.refuse import refuse_unsupported
from exporter.passes.sharing import share_activation_quantizers
from exporter.passes.squeezes import drop_noop_squeezes
from exporter.targets import Target

__all__ = [
    "CPU_PASSES",
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
    name_boundaries,
    share_activation_quantizers,
    fuse_linear,
    fold_scales,
    choose_containers,
    pack_weights,
    store_exactly_in_half,
)
CPU_PASSES: tuple[Pass, ...] = (lower_to_cpu, refuse_unsupported)
TENSORRT_PASSES: tuple[Pass, ...] = (lower_to_tensorrt, spell_out_gelu, refuse_unsupported)


def lowering_passes(target: Target) -> tuple[Pass, ...]:
    """The passes that turn the waist into the target's own operators."""
    return CPU_PASSES if target.engine == "onnxruntime" else TENSORRT_PASSES
