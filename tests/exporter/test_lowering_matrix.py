"""Every preset on every TensorRT target: lowered to what its parsers take and built where the builder runs here, or
refused by the layer's name.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from exporter.calibration.block_scales import choose_block_scales, static_scale
from exporter.calibration.scales import choose_scales
from exporter.compute import product_type
from exporter.container_choice import choose_container
from exporter.device.build import build_engine
from exporter.device.child import WorkerError, run_worker
from exporter.device.jobs import EngineJob
from exporter.device.profiles import BatchRange, profile_shapes
from exporter.device.rtx_file import check_rtx_engine
from exporter.errors import InputError
from exporter.models.loading import load_transformer, model_shapes
from exporter.models.pixart import PixArtAdapter
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.layer_table import read_layer_table
from exporter.plan import LayerPlan, Plan, plan_layers
from exporter.presets import PRESETS, LayerScheme
from exporter.progress import NullProgress
from exporter.quantize import QuantizedWeight, planned_linear, quantize_model, round_to_nearest
from exporter.recipe import Recipe
from exporter.targets import TARGETS, Storage
from exporter.to_onnx import to_onnx
from exporter.tracing import batch_axis, trace
from plugins.formats import get_format
from plugins.op import attach_functions
from tests.exporter.conftest import TOKENS

DEVICES = [name for name, target in TARGETS.items() if target.engine != "onnxruntime"]
RTX = [name for name in DEVICES if TARGETS[name].engine == "tensorrt-rtx"]
GROUP = 32
# Every preset, and what rules add to them: the same W4A6 in FP8, and blocks of INT4 weights (E1M2's values).
SCHEMES: Mapping[str, LayerScheme] = MappingProxyType(
    {
        **PRESETS,
        "w4a6 in fp8": replace(PRESETS["w4a6"], container="fp8"),
        "e1m2 alone": LayerScheme("e1m2", 128, "group", "none"),
    }
)
WHOLE = "w4a6"
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra 'rtx'")


class FeedForward(nn.Module):
    """The first block's two linears with a GELU between them, called as in the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.transformer_blocks = model.transformer_blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer_blocks[0].ff(x)


class Matrix:
    """The waist graphs of the tiny model, cut to its first block, each traced once.

    Of all schemes but one it is cut to the block's feed-forward: what lies around the linears is the same in all.
    """

    def __init__(self, job: Path, folder: Path) -> None:
        self.model = load_transformer(job / "model" / "transformer", PixArtAdapter())
        self.model.transformer_blocks = self.model.transformer_blocks[:1]  # type: ignore[index]
        self.adapter = PixArtAdapter()
        self.folder = folder
        self.traced = cache(self._traced)

    def plan(self, name: str, target: str) -> Plan:
        """The scheme with groups that divide the tiny model's rows."""
        scheme = SCHEMES[name]
        rule = {
            "match": "transformer_blocks.*",
            "weight": scheme.weight_format,
            "scales": scheme.scales,
            "group": min(scheme.group_size, GROUP),
            "activation": scheme.activation_format,
            "container": scheme.container,
        }
        recipe = {"model": {"weights": "w"}, "calibration": {"prompts": "p"}, "layers": [rule]}
        shapes = model_shapes(self.model, self.adapter)
        return plan_layers(Recipe.model_validate(recipe), shapes, self.adapter.high_precision, TARGETS[target])

    def lowered(self, name: str, target: str, storage: Storage | None = None) -> onnx.ModelProto:
        """The graph that the target's engine is made of."""
        layers = self.plan(name, target).layers
        if name != WHOLE:
            layers = tuple(layer for layer in layers if ".ff." in layer.name)
        traced = self.traced(layers)
        chosen = TARGETS[target] if storage is None else TARGETS[target].with_storage(storage)
        # What the target computes its products in is the least that the recipe must ask for.
        waist, _ = run_passes(traced, WAIST_PASSES, chosen)
        return run_passes(waist, lowering_passes(chosen, product_type(chosen)), chosen)[0]

    def _traced(self, layers: tuple[LayerPlan, ...]) -> onnx.ModelProto:
        plan = Plan(layers=layers, high_precision=(), fp32_bytes=0, expected_bytes=0)
        weights = {layer.name: _rounded(self.model, layer) for layer in layers}
        quantized = quantize_model(self.model, plan, weights)
        if all(".ff." in layer.name for layer in layers):
            x, shapes = torch.zeros(2, TOKENS, 64), ({0: batch_axis()},)
            graph = ir.serde.serialize_model(trace(FeedForward(quantized), [x], shapes, ["x"], "sample"))
            attach_functions(graph)
            return graph
        example = self.adapter.example_inputs(quantized, batch=2, tokens=TOKENS, resolution=4)
        path = self.folder / "traced.onnx"
        to_onnx(quantized, self.adapter, example, path)
        return onnx.load(path)


def _rounded(model: nn.Module, layer: LayerPlan) -> QuantizedWeight:
    fmt = get_format(layer.weight_format)
    weight = planned_linear(model, layer).weight.detach()
    factors = layer.multipliers if layer.scales == "foldable" else ()
    if layer.scaling is not None:
        static = static_scale(4.0, layer.scaling) if layer.scaling.has_tensor_scale else None
        return round_to_nearest(weight, choose_block_scales(weight, layer.scaling, "absmax"), fmt, static)
    with torch.no_grad():
        scales = choose_scales(weight, fmt, layer.group_size, "absmax", None, factors)
        return round_to_nearest(weight, scales, fmt)


@pytest.fixture(scope="module")
def matrix(tiny_job: Path, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tiny_job, tmp_path_factory.mktemp("matrix"))


def container_on(name: str, target: str) -> str | None:
    """The container that the code chooses, None where the target refuses the scheme."""
    scheme = replace(SCHEMES[name], group_size=min(SCHEMES[name].group_size, GROUP))
    try:
        return choose_container("layer", scheme, 64, TARGETS[target])
    except InputError:
        return None


BUILT = [(name, target) for name in SCHEMES for target in RTX if container_on(name, target)]
REFUSED = [(name, target) for name in SCHEMES for target in DEVICES if not container_on(name, target)]
# One of every container with products of either type, on the oldest GPU that has it.
REPRESENTATIVE = list(
    {
        (container_on(name, target), TARGETS[target].fp32_products): (name, target) for name, target in reversed(BUILT)
    }.values()
)


def test_the_hardware_s_types_are_where_they_should_be() -> None:
    """The table of the recipes' documentation, by hand for the types that are not everywhere."""
    built = {name: [target for scheme, target in BUILT if scheme == name] for name in SCHEMES}
    assert built["w4a6"] == built["w4a8_int"] == built["w4a16"] == RTX
    assert built["e1m2 alone"] == RTX[1:]
    assert built["w4a8"] == built["w8a8"] == built["w4a6 in fp8"] == ["rtx-sm89", "rtx-sm120", "rtx-sm121"]
    assert built["nvfp4"] == built["mxfp8"] == ["rtx-sm120", "rtx-sm121"]
    assert len(REPRESENTATIVE) == 6


@pytest.mark.parametrize(("name", "target"), REFUSED)
def test_what_a_target_cannot_run_is_refused_by_the_layer_s_name(matrix: Matrix, name: str, target: str) -> None:
    message = rf"transformer_blocks\.0\.\S+: target {target} cannot run .*targets that can: \w"
    with pytest.raises(InputError, match=message):
        matrix.plan(name, target)


@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("name", SCHEMES)
def test_everything_else_is_lowered_to_what_the_parsers_take(matrix: Matrix, name: str, target: str) -> None:
    container = container_on(name, target)
    if container is None:
        return
    # `refuse_unsupported`, the last of the passes, checks every operator and every tensor's type.
    lowered = matrix.lowered(name, target)
    assert {entry.container for entry in read_layer_table(lowered)} == {container}
    assert not lowered.functions


def build(matrix: Matrix, name: str, target: str, folder: Path, storage: Storage | None = None) -> bytes:
    onnx.save(matrix.lowered(name, target, storage), folder / "lowered.onnx")
    build_engine(folder / "lowered.onnx", folder / "out.plan", TARGETS[target], NullProgress())
    check_rtx_engine(folder / "out.plan")
    return (folder / "out.plan").read_bytes()


@needs_rtx
@pytest.mark.parametrize(("name", "target"), REPRESENTATIVE)
def test_one_engine_of_every_container_is_built(matrix: Matrix, name: str, target: str, tmp_path: Path) -> None:
    engine = build(matrix, name, target, tmp_path)
    # The engine carries the source of its generated kernels, whose types show what was multiplied.
    kernels = {
        "int8": b"__myln_int8* __restrict__",
        "fp8": b"__myln_fp8_e4m3* __restrict__",
        "int4": b"type=int4",
        "fp4": b"type=fp4_e2m1",
        "mxfp8": b"type=fp8_e8m0",
    }
    assert kernels[container_on(name, target) or ""] in engine


@needs_rtx
@pytest.mark.parametrize("name", ["w4a6", "w4a8"])
def test_the_builder_keeps_packed_weights_packed(matrix: Matrix, name: str, tmp_path: Path) -> None:
    """They are decoded into the container's bytes by a kernel of the engine."""
    kernels = {"w4a6": b"__myln_int8* __restrict__ __v1", "w4a8": b"__myln_fp8_e4m3* __restrict__ __v1"}
    packed = build(matrix, name, "rtx-sm89", tmp_path, "packed")
    assert b"type=int4" not in build(matrix, name, "rtx-sm89", tmp_path)
    layers = read_layer_table(matrix.lowered(name, "rtx-sm89", "packed"))
    assert packed.count(b"type=int4") >= len(layers)
    assert kernels[name] in packed


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), [pair for pair in BUILT if pair not in REPRESENTATIVE])
def test_every_other_engine_is_built(matrix: Matrix, name: str, target: str, tmp_path: Path) -> None:
    build(matrix, name, target, tmp_path)


@needs_rtx
def test_turing_has_fp16_products_because_the_builder_refuses_others(matrix: Matrix, tmp_path: Path) -> None:
    """The day this fails, `fp32_products` of rtx-sm75 can go."""
    lowered = matrix.lowered("w4a6", "rtx-sm80")
    onnx.save(lowered, tmp_path / "lowered.onnx")
    shapes = profile_shapes(lowered, BatchRange())
    job = EngineJob(str(tmp_path / "lowered.onnx"), str(tmp_path / "out.plan"), True, (7, 5), shapes)
    with pytest.raises(WorkerError, match="FP32 GEMM is not supported"):
        run_worker("build", job, "building", NullProgress())


def test_the_documentation_s_table_is_the_generated_one() -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-m", "tools.container_table", "--check"], cwd=root, check=False)
    assert run.returncode == 0, "run: python -m tools.container_table"
