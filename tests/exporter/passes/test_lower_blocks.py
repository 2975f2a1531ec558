"""Block scaling: fused, shared, lowered to TensorRT's and the CPU's operators, and emulated for the gate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from exporter.errors import InputError
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.emulate import emulation_passes
from exporter.passes.layer_table import LayerEntry, read_layer_table
from exporter.targets import TARGETS
from plugins.block_quantize.reference import quantize_blocks
from plugins.block_scales import BLOCK_SCALINGS, BlockScaling
from plugins.float_gemm.reference import gemm
from plugins.formats import Values, get_format
from tests.exporter.passes.waist_graphs import (
    WaistGraph,
    Weight,
    make_weight,
    one_linear,
    op_types,
    run,
    snr_db,
    tokens,
)

INPUT_SCALE = 0.37
SCALINGS = pytest.mark.parametrize("name", BLOCK_SCALINGS)
QUANTIZER = {"nvfp4": "TRT_FP4DynamicQuantize", "mx": "TRT_MXFP8DynamicQuantize"}
CONTAINER = {"nvfp4": "fp4", "mx": "mxfp8"}


def block_weight(layer: str, scaling: BlockScaling, *, bias: bool = True, seed: int = 0) -> Weight:
    """Random codes and representable scales of very different sizes."""
    weight = make_weight(layer, scaling.value_format, scaling.group_size, "group", bias=bias, seed=seed)
    rng = np.random.default_rng([seed, *layer.encode()])
    middle = len(scaling.grid) // 2
    on_grid = scaling.grid[rng.integers(middle - 4, middle + 4, weight.scales.shape)]
    return replace(weight, scales=on_grid * np.float32(0.75 / 2**10 if scaling.has_tensor_scale else 1.0))


def block_linear(scaling: BlockScaling, *, bias: bool = True) -> tuple[onnx.ModelProto, Weight]:
    weight = block_weight("blocks.0.fc", scaling, bias=bias)
    waist = WaistGraph()
    static = INPUT_SCALE if scaling.has_tensor_scale else None
    return waist.model(waist.linear_in_blocks("x", weight, scaling, static)), weight


def expected(x: Values, weight: Weight, scaling: BlockScaling) -> tuple[Values, Values]:
    static = np.float32(INPUT_SCALE) if scaling.has_tensor_scale else None
    values, scales = quantize_blocks(x, scaling, static)
    fmt = get_format(weight.format)
    y = gemm(values, weight.codes, weight.scales, fmt, group_size=weight.group_size, x_scales=scales, bias=weight.bias)
    return values, y


def lower(model: onnx.ModelProto, target: str) -> tuple[onnx.ModelProto, tuple[LayerEntry, ...]]:
    passes = (*WAIST_PASSES, *lowering_passes(TARGETS[target]))
    lowered, _ = run_passes(model, passes, TARGETS[target])
    return lowered, read_layer_table(lowered)


@SCALINGS
def test_quantizer_and_weight_become_one_linear(name: str) -> None:
    scaling = BLOCK_SCALINGS[name]
    model, weight = block_linear(scaling)
    waist, _ = run_passes(model, WAIST_PASSES, TARGETS["rtx-sm120"])
    kinds = op_types(waist)
    assert len(kinds) == 2
    packed_in = f"_g{scaling.group_size}_k64_{scaling.scale_format}scales"
    assert packed_in in kinds[1]
    (entry,) = read_layer_table(waist)
    assert (entry.scales, entry.container, entry.group_size) == (name, CONTAINER[name], scaling.group_size)
    y, values = run(waist, tokens(), entry.values)
    wanted_values, wanted = expected(tokens(), weight, scaling)
    assert np.array_equal(values, wanted_values)
    assert snr_db(wanted, y) > 120


@SCALINGS
@pytest.mark.parametrize("target", ["rtx-sm120", "b200", "thor"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_stands_for_the_lowered_graph_computes_the_reference(name: str, target: str, bias: bool) -> None:
    scaling = BLOCK_SCALINGS[name]
    model, weight = block_linear(scaling, bias=bias)
    lowered, (entry,) = lower(model, target)
    assert entry.container == CONTAINER[name]
    assert QUANTIZER[name] in op_types(lowered)
    emulated, (result, *_) = run_passes(lowered, emulation_passes(TARGETS[target]), TARGETS[target])
    assert result.changed >= 3
    (entry,) = read_layer_table(emulated)
    for x in (tokens(), tokens(seed=1) * np.float32(1e-4), np.zeros((1, 5, 64), np.float32)):
        values, y = expected(x, weight, scaling)
        found, found_values = run(emulated, x, entry.values)
        assert np.array_equal(entry.decode_values(found_values), values)
        assert snr_db(y, found) > 120


@SCALINGS
def test_on_a_cpu_it_runs_in_float32(name: str) -> None:
    scaling = BLOCK_SCALINGS[name]
    model, weight = block_linear(scaling)
    lowered, (entry,) = lower(model, "cpu")
    assert entry.container == "fp32"
    assert snr_db(expected(tokens(), weight, scaling)[1], run(lowered, tokens())[0]) > 120
    assert emulation_passes(TARGETS["cpu"]) == ()


def test_nvfp4_weights_are_fp4_codes_fp8_scales_and_one_float() -> None:
    model, weight = block_linear(BLOCK_SCALINGS["nvfp4"])
    lowered, _ = lower(model, "rtx-sm120")
    assert lowered.opset_import[0].version == 23
    stored = {t.name: t for t in lowered.graph.initializer}
    codes, scales = stored["blocks.0.fc.fp4"], stored["blocks.0.fc.block_scales"]
    assert (codes.data_type, list(codes.dims)) == (TensorProto.FLOAT4E2M1, [64, 24])
    assert (scales.data_type, list(scales.dims)) == (TensorProto.FLOAT8E4M3FN, [4, 24])
    whole = numpy_helper.to_array(stored["blocks.0.fc.tensor_scale"])
    values = numpy_helper.to_array(codes).astype(np.float32).T
    assert np.array_equal(values, get_format("e2m1").values[weight.codes])
    assert np.array_equal(numpy_helper.to_array(scales).astype(np.float32).T * whole, weight.scales)


def test_mx_scales_are_bytes_since_the_parser_takes_no_e8m0() -> None:
    model, weight = block_linear(BLOCK_SCALINGS["mx"])
    lowered, _ = lower(model, "rtx-sm120")
    stored = {t.name: t for t in lowered.graph.initializer}
    assert stored["blocks.0.fc.mxfp8"].data_type == TensorProto.FLOAT8E4M3FN
    scales = numpy_helper.to_array(stored["blocks.0.fc.block_scales"])
    assert scales.dtype == np.uint8
    assert np.array_equal(np.ldexp(np.float32(1), scales.T.astype(int) - 127), weight.scales)


@SCALINGS
def test_scales_that_do_not_ship_are_refused(name: str) -> None:
    scaling = BLOCK_SCALINGS[name]
    weight = make_weight("blocks.0.fc", scaling.value_format, scaling.group_size, "group")
    waist = WaistGraph()
    model = waist.model(waist.linear_in_blocks("x", weight, scaling, INPUT_SCALE if name == "nvfp4" else None))
    with pytest.raises(InputError, match=rf"blocks\.0\.fc: its weight scales are not {scaling.scale_format} values"):
        lower(model, "rtx-sm120")


def test_a_gpu_without_the_type_is_refused_by_name() -> None:
    model, _ = block_linear(BLOCK_SCALINGS["nvfp4"])
    with pytest.raises(InputError, match=r"blocks\.0\.fc: target h100 cannot run .*targets that can: cpu, rtx-sm120"):
        lower(model, "h100")


def test_quantizers_with_equal_static_scales_are_shared_and_others_not() -> None:
    def quantizers(*input_scales: float) -> int:
        waist = WaistGraph()
        scaling = BLOCK_SCALINGS["nvfp4"]
        layers = [f"blocks.{index}.fc" for index in range(len(input_scales))]
        outputs = [
            waist.linear_in_blocks("x", block_weight(layer, scaling), scaling, scale)
            for layer, scale in zip(layers, input_scales, strict=True)
        ]
        return op_types(lower(waist.model(*outputs), "rtx-sm120")[0]).count("TRT_FP4DynamicQuantize")

    assert quantizers(0.5, 0.5, 0.5) == 1
    assert quantizers(0.5, 0.25) == 2


def test_operands_in_other_groups_are_not_fused() -> None:
    waist = WaistGraph()
    weight = make_weight("blocks.0.fc", "e2m1", 32, "group")
    model = waist.model(waist.linear_in_blocks("x", weight, BLOCK_SCALINGS["nvfp4"], INPUT_SCALE))
    fused, _ = run_passes(model, WAIST_PASSES, TARGETS["cpu"])
    assert [kind for kind in op_types(fused) if kind.startswith("FloatGemm_e2m1_none_g32")]


def test_other_graphs_need_no_emulation() -> None:
    for target, activation in (("rtx-sm86", "e2m3"), ("rtx-sm89", "e4m3")):
        weight = make_weight("fc", group_size=0, kind="channel")
        lowered, _ = lower(one_linear(weight, activation), target)
        before = op_types(lowered)
        emulated, (result, *_) = run_passes(lowered, emulation_passes(TARGETS[target]), TARGETS[target])
        assert (result.changed, op_types(emulated)) == (0, before)
