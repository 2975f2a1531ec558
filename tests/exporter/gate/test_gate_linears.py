"""The gate on a hand-made graph: what is wrong with one linear is found, and that linear is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.errors import FidelityError
from exporter.gate.linears import LinearsComparison, compare_linears
from exporter.gate.records import LinearRecord
from exporter.gate.table import SNR_CEILING_DB
from tests.exporter.gate.hand_made import LAYERS, Example

FIRST, SECOND = LAYERS

Compare = Callable[..., LinearsComparison]


@pytest.fixture
def compare(example: Example, tmp_path: Path) -> Compare:
    def run(model: onnx.ModelProto, **changes: object) -> LinearsComparison:
        arguments = {"layers": example.layers, "records": example.records()} | changes
        path = tmp_path / "linears.onnx"
        return compare_linears(model, arguments["layers"], arguments["records"], "lowered", path, optimized=True)

    return run


def failing(result: LinearsComparison) -> list[str]:
    return [row.name for row in result.rows if not row.passed]


def test_a_right_graph_passes(example: Example, compare: Compare) -> None:
    result = compare(example.model)
    assert [row.name for row in result.rows] == list(LAYERS)
    assert not failing(result)
    assert all(row.code_count == 40 * 64 and row.code_mismatches == 0 for row in result.rows)
    assert all(100 < row.snr_db <= SNR_CEILING_DB for row in result.rows)
    assert not result.relaxed
    assert set(result.expected) == {f"{layer}.{part}" for layer in LAYERS for part in ("values", "output")}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("channels", [slice(None), slice(7, 8)])
def test_a_scale_off_by_one_percent_is_named(example: Example, compare: Compare, layer: str, channels: slice) -> None:
    scales = example.array(f"{layer}.scales")
    scales[channels] *= np.float32(1.01)
    result = compare(example.with_array(f"{layer}.scales", scales))
    assert failing(result) == [layer]
    row = next(row for row in result.rows if not row.passed)
    assert ("channel 7, of 64, down to 40.0 dB" in row.detail) == (channels != slice(None))


def test_a_wrong_scale_of_a_faint_channel_is_found(example: Example, compare: Compare) -> None:
    """Its share of the whole output is far below 100 dB, so only its own channel can tell."""
    faint, wrong = example.array(f"{FIRST}.scales"), example.array(f"{FIRST}.scales")
    faint[3] = 1e-6
    wrong[3] = 1.01e-6
    record = example.records()[FIRST]
    expected = record.y.copy()
    expected[:, 3] = (record.y[:, 3] - record.bias[3]) * (1e-6 / example.array(f"{FIRST}.scales")[3])
    bias = example.array(f"{FIRST}.bias")
    bias[3] = 0
    floor = record.noise_floor.copy()
    floor[:, 3] = 1e-12
    records = example.records() | {FIRST: replace(record, y=expected, bias=bias, noise_floor=floor)}
    right = replace(example, model=example.with_array(f"{FIRST}.bias", bias))
    assert not failing(compare(right.with_array(f"{FIRST}.scales", faint), records=records))
    result = compare(right.with_array(f"{FIRST}.scales", wrong), records=records)
    assert failing(result) == [FIRST]
    assert result.rows[0].snr_db > 100
    assert "output channel 3" in result.rows[0].detail


def test_one_flipped_bit_of_one_code_is_named(example: Example, compare: Compare) -> None:
    codes = example.array(f"{SECOND}.codes")
    codes[5, 9] ^= 1
    result = compare(example.with_array(f"{SECOND}.codes", codes))
    assert failing(result) == [SECOND]
    assert "output channel 5" in result.rows[1].detail


def test_a_swapped_pair_of_weights_is_named(example: Example, compare: Compare) -> None:
    codes = example.array(f"{SECOND}.codes")
    row = 11
    other = int(np.flatnonzero((codes[row] & 7) != (codes[row, 0] & 7))[0])
    codes[row, [0, other]] = codes[row, [other, 0]]
    result = compare(example.with_array(f"{SECOND}.codes", codes))
    assert failing(result) == [SECOND]
    assert "output channel 11" in result.rows[1].detail


def test_a_wrong_quantizer_is_found_by_its_codes(example: Example, compare: Compare) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(example.model)
    quantize = next(node for node in model.graph.node if f"{FIRST}.values" in node.output)
    # Twice the input has twice the scale and the same codes; an offset does not.
    model.graph.node.insert(1, onnx.helper.make_node("Add", ["blocks.0.input", "gain"], ["shifted"]))
    next(node for node in model.graph.node if node == quantize).input[0] = "shifted"
    result = compare(model)
    assert FIRST in failing(result)
    assert "codes differ away from rounding boundaries" in result.rows[0].detail
    assert result.rows[0].code_mismatches > result.rows[0].explained


def test_a_flip_at_a_boundary_is_counted_and_its_row_left_out(example: Example, compare: Compare) -> None:
    """A reference whose code fell on the other side of a boundary, with the output that belongs to it."""
    record = example.records()[FIRST]
    x, values, y = record.x.copy(), record.values.copy(), record.y.copy()
    scale = record.scales[4, 0]
    column = int(np.argmin(np.abs(np.abs(x[4] / scale) - 1)))
    x[4, column] = np.float32(1.0625) * scale
    values[4, column] = 1.125
    y[4] += 100
    records = example.records() | {FIRST: replace(record, x=x, values=values, y=y)}
    result = compare(example.model, records=records)
    assert not failing(result)
    assert (result.rows[0].code_mismatches, result.rows[0].explained) == (1, 1)
    assert result.rows[0].snr_db > 100
    assert list(result.relaxed) == [f"{FIRST}.output"]
    assert result.relaxed[f"{FIRST}.output"] < 50


def test_layers_that_share_a_quantizer_count_its_codes_once(example: Example, compare: Compare) -> None:
    first, second = example.layers
    shared = replace(second, input=first.input, values=first.values)
    model = onnx.ModelProto()
    model.CopyFrom(example.model)
    for node in model.graph.node:
        if f"{SECOND}.output" in node.output:
            node.input[0], node.input[1] = f"{FIRST}.values", f"{FIRST}.x_scales"
    # The second layer's reference has another input, so it must be found to deviate.
    result = compare(model, layers=(first, shared))
    assert failing(result) == [SECOND]
    assert [row.code_count for row in result.rows] == [40 * 64, 0]


@pytest.mark.parametrize("changed", ["layers", "records"])
def test_other_layers_than_the_reference_are_refused(example: Example, compare: Compare, changed: str) -> None:
    full = {"layers": example.layers, "records": example.records()}
    less = {"layers": example.layers[:1], "records": {FIRST: example.records()[FIRST]}}
    with pytest.raises(FidelityError, match=SECOND):
        compare(example.model, **(full | {changed: less[changed]}))


def rounded_products(example: Example) -> onnx.ModelProto:
    """The graph with each linear's product, before the bias, rounded to FP16."""
    model = onnx.ModelProto()
    model.CopyFrom(example.model)
    for layer in LAYERS:
        gemm = next(node for node in model.graph.node if f"{layer}.output" in node.output)
        index = list(model.graph.node).index(gemm)
        gemm.output[0] = f"{layer}.biased"
        steps = (
            ("Sub", [f"{layer}.biased", f"{layer}.bias"], f"{layer}.sums", {}),
            ("Cast", [f"{layer}.sums"], f"{layer}.half", {"to": onnx.TensorProto.FLOAT16}),
            ("Cast", [f"{layer}.half"], f"{layer}.wide", {"to": onnx.TensorProto.FLOAT}),
            ("Add", [f"{layer}.wide", f"{layer}.bias"], f"{layer}.output", {}),
        )
        for offset, (op_type, inputs, output, attributes) in enumerate(steps, start=1):
            node = onnx.helper.make_node(op_type, inputs, [output], **attributes)
            model.graph.node.insert(index + offset, node)
    return model


def with_fp16_products(example: Example) -> dict[str, LinearRecord]:
    return {layer: replace(record, products="fp16") for layer, record in example.records().items()}


def test_products_rounded_to_fp16_are_held_to_that_rounding(example: Example, compare: Compare) -> None:
    model = rounded_products(example)
    result = compare(model, records=with_fp16_products(example))
    assert not failing(result)
    assert all(66 <= row.threshold_db < 70 and row.threshold_db < row.snr_db < 80 for row in result.rows)
    assert result.relaxed == {f"{row.name}.output": row.threshold_db for row in result.rows}
    assert failing(compare(model)) == list(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("channels", [slice(None), slice(7, 8)])
def test_a_scale_off_by_one_percent_is_named_with_fp16_products(
    example: Example, compare: Compare, layer: str, channels: slice
) -> None:
    scales = example.array(f"{layer}.scales")
    scales[channels] *= np.float32(1.01)
    wrong = replace(example, model=example.with_array(f"{layer}.scales", scales))
    result = compare(rounded_products(wrong), records=with_fp16_products(example))
    assert failing(result) == [layer]
    detail = next(row.detail for row in result.rows if not row.passed)
    assert "at least 66 dB needed" in detail
    assert ("output channel 7, of 64" in detail) == (channels != slice(None))


def test_a_nan_fails(example: Example, compare: Compare) -> None:
    bias = example.array(f"{FIRST}.bias")
    bias[0] = np.nan
    result = compare(example.with_array(f"{FIRST}.bias", bias))
    assert failing(result) == [FIRST]
    assert result.rows[0].snr_db == -SNR_CEILING_DB
