"""Sabotage of a finished file, and of a graph in its work folder, is traced to its place and told apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from exporter.bisect.free_run import first_true, run_free
from exporter.bisect.look import look_at
from exporter.bisect.search import bisect
from exporter.bisect.suspect import open_suspect
from exporter.cli import main
from exporter.models.loading import load_transformer, model_shapes
from exporter.models.pixart import PixArtAdapter
from exporter.plan import plan_layers
from exporter.recipe import load_recipe
from exporter.targets import get_target
from tests.exporter.bisect.conftest import Sabotage
from tests.exporter.tampering import flip_a_bit_of_one_code

BLOCK = "transformer_blocks.1"
LAYER = f"{BLOCK}.ff.net.0.proj"


def changed(model: onnx.ModelProto, change: Callable[[dict[str, np.ndarray]], str]) -> None:
    arrays = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    name = change(arrays)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(arrays[name], name))


def flip_one_nibble(model: onnx.ModelProto) -> None:
    changed(model, lambda arrays: flip_a_bit_of_one_code(arrays, LAYER))


def one_percent_off(model: onnx.ModelProto) -> None:
    def scale(arrays: dict[str, np.ndarray]) -> str:
        arrays[f"{LAYER}.row_scales"] *= np.float32(1.01)
        return f"{LAYER}.row_scales"

    changed(model, scale)


def swap_weights(model: onnx.ModelProto) -> None:
    """The packed codes of two layers of the same shape change places."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    one, other = (
        next(tensor for name, tensor in tensors.items() if name.startswith(layer) and tensor.data_type == 21)
        for layer in (f"{BLOCK}.attn1.to_v", f"{BLOCK}.attn2.to_q")
    )
    one.raw_data, other.raw_data = other.raw_data, one.raw_data


def masked_attention(model: onnx.ModelProto) -> onnx.NodeProto:
    """The second block's cross-attention."""
    return [node for node in model.graph.node if node.op_type == "MultiHeadAttention"][3]


def drop_the_mask(model: onnx.ModelProto) -> None:
    node = masked_attention(model)
    assert node.input[5]
    node.input[5] = ""


def open_the_mask_of_all_blocks(model: onnx.ModelProto) -> None:
    """(1 - mask)·-10000, outside the blocks, becomes (1 - mask)·-1."""
    tensors = [one for one in model.graph.initializer if -1e4 in numpy_helper.to_array(one).ravel()[:1]]
    assert len(tensors) == 1
    tensors[0].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensors[0]) / 1e4, tensors[0].name))


@pytest.mark.slow
def test_a_right_file_is_clean(tiny_export: Path) -> None:
    before = sorted(path.name for path in tiny_export.with_name("tiny.work").iterdir())
    found = bisect(tiny_export)
    assert found.clean
    assert (found.place, found.part, found.trials, found.free.first, found.notes) == ("", None, (), "", ())
    assert [row.name for row in found.free.rows] == ["transformer_blocks.0.output", f"{BLOCK}.output", "sample"]
    assert sorted(path.name for path in tiny_export.with_name("tiny.work").iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("change", [flip_one_nibble, one_percent_off])
def test_one_wrong_layer_is_named_and_fp32_heals_it(sabotaged: Callable[[Sabotage], Path], change: Sabotage) -> None:
    found = bisect(sabotaged(change))
    assert [row.name for row in found.guilty_linears] == [LAYER]
    assert found.place == BLOCK
    assert found.part is None
    (trial,) = found.trials
    assert trial.goes_away
    assert trial.rules == (f'- {{match: "{LAYER}", weight: none}}',)
    effect = next(effect for effect in trial.effects if effect.name == BLOCK)
    assert effect.after_db > 100 > effect.before_db
    assert "has changed since it was exported" in found.notes[0]


@pytest.mark.slow
def test_swapped_weights_are_two_wrong_layers_of_which_one_alone_does_not_heal(
    sabotaged: Callable[[Sabotage], Path],
) -> None:
    found = bisect(sabotaged(swap_weights))
    assert [row.name for row in found.guilty_linears] == [f"{BLOCK}.attn1.to_v", f"{BLOCK}.attn2.to_q"]
    assert found.place == BLOCK
    assert [(len(trial.layers), trial.goes_away) for trial in found.trials] == [(1, False), (2, True)]
    assert found.free.first == f"{BLOCK}.output"


@pytest.mark.slow
def test_a_broken_mask_is_no_linears_fault(sabotaged: Callable[[Sabotage], Path]) -> None:
    found = bisect(sabotaged(drop_the_mask))
    assert found.guilty_linears == ()
    assert found.place == BLOCK
    assert found.part is not None
    assert found.part.before == f"{BLOCK}.attn2.to_out.0"
    assert {f"{BLOCK}.attn2.to_{one}" for one in "qkv"} <= set(found.part.after)
    assert "MultiHeadAttention" in found.part.operators
    assert found.trials == ()
    assert "all quantized linears are right" in found.verdict
    assert all(row.passed for row in found.look.blocks), "the residual stream hides it: only the layers' inputs tell"


@pytest.mark.slow
def test_what_all_blocks_share_is_found_before_them(sabotaged: Callable[[Sabotage], Path]) -> None:
    found = bisect(sabotaged(open_the_mask_of_all_blocks))
    assert found.place == "blocks.encoder_attention_mask"
    assert found.part is not None
    assert found.part.after == ("encoder_attention_mask",)
    assert found.part.before == "blocks.encoder_attention_mask"
    assert "Mul" in found.part.operators


@pytest.mark.slow
def test_a_wrong_layer_does_not_hide_a_wrong_attention(sabotaged: Callable[[Sabotage], Path]) -> None:
    def both(model: onnx.ModelProto) -> None:
        one_percent_off(model)
        drop_the_mask(model)

    found = bisect(sabotaged(both))
    assert [row.name for row in found.guilty_linears] == [LAYER]
    assert [trial.goes_away for trial in found.trials] == [False]
    assert found.part is not None
    assert found.part.before == f"{BLOCK}.attn2.to_out.0"


@pytest.mark.slow
def test_an_exported_graph_is_bisected_in_its_work_folder(tiny_export: Path, tmp_path: Path) -> None:
    work = shutil.copytree(tiny_export.with_name("tiny.work"), tmp_path / "tiny.work")
    graph = work / "exported.cpu.onnx"
    assert bisect(graph).clean
    model = onnx.load(graph)

    def scale(arrays: dict[str, np.ndarray]) -> str:
        (gemm,) = (
            one
            for one in model.graph.node
            if f"{LAYER}" in [a.s.decode() for a in one.attribute] and "Gemm" in one.op_type
        )
        name = next(
            name for name in gemm.input if name in arrays and arrays[name].dtype == np.float32 and "scale" in name
        )
        arrays[name] *= np.float32(1.01)
        return name

    changed(model, scale)
    onnx.save(model, graph)
    found = bisect(graph)
    assert found.stage == "exported"
    assert [row.name for row in found.guilty_linears] == [LAYER]
    assert [trial.goes_away for trial in found.trials] == [True]
    (weights,) = work.glob("quantized.*.safetensors")
    weights.unlink()
    found = bisect(graph)
    assert found.trials == ()
    assert "not tried in FP32" in found.notes[0]


def planned_layers(recipe: Path) -> set[str]:
    loaded = load_recipe(recipe)
    shapes = model_shapes(
        load_transformer(Path(loaded.model.weights) / "transformer", PixArtAdapter()), PixArtAdapter()
    )
    plan = plan_layers(loaded, shapes, PixArtAdapter().high_precision, get_target("cpu"))
    return {layer.name for layer in plan.layers}


@pytest.mark.slow
def test_the_printed_rule_wins_over_the_recipes_own(
    tiny_job: Path, sabotaged: Callable[[Sabotage], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export with it computes that layer, and no other, in FP32, as the trial did that left nothing to deviate."""
    assert main(["bisect", str(sabotaged(one_percent_off))]) == 4
    lines = capsys.readouterr().out.splitlines()
    printed = lines[lines.index("layers:") :][:2]
    text = (tiny_job / "tiny.yaml").read_text()
    recipes = [tmp_path / "before.yaml", tmp_path / "after.yaml"]
    for file, rules in zip(recipes, (text, text.replace("layers:\n", "\n".join([*printed, ""]))), strict=True):
        file.write_text(rules.replace("weights: model", f"weights: {tiny_job / 'model'}"))
    before, after = (planned_layers(file) for file in recipes)
    assert before - after == {LAYER}
    assert after < before


@pytest.mark.slow
def test_the_command_tells_and_ends_with_4(
    sabotaged: Callable[[Sabotage], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = sabotaged(one_percent_off)
    assert main(["bisect", str(output), "--quiet", "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert document["guilty_linears"] == [LAYER]
    assert document["rules"] == [f'- {{match: "{LAYER}", weight: none}}']
    assert main(["bisect", str(output), "--no-trial"]) == 4
    text = capsys.readouterr().out
    assert "deviates first" in text
    assert "in FP32" not in text


@pytest.mark.slow
def test_with_little_memory_the_boundaries_are_halved(
    sabotaged: Callable[[Sabotage], Path], tiny_export: Path, tmp_path: Path
) -> None:
    output = sabotaged(swap_weights)
    at_once, halved = (run_free(open_suspect(output), tmp_path, available) for available in (2**30, 0))
    assert at_once.first == halved.first == f"{BLOCK}.output"
    assert "one run with all 3" in at_once.how
    assert "halving" in halved.how
    assert run_free(open_suspect(tiny_export), tmp_path, 0).first == ""


@pytest.mark.slow
def test_a_large_graph_is_looked_at_in_segments_with_the_same_result(
    sabotaged: Callable[[Sabotage], Path], tmp_path: Path
) -> None:
    whole = open_suspect(sabotaged(swap_weights))
    assert not whole.segmented, "16 million weights are large, and these are few"
    large = replace(whole, segmented=True)
    looks = [look_at(suspect, suspect.model, tmp_path) for suspect in (whole, large)]
    rows = [(*look.blocks, *look.inputs, look.end_to_end) for look in looks]
    runs = [run_free(suspect, tmp_path).rows for suspect in (whole, large)]
    assert runs[1][0].snr_db > 100 > runs[1][1].snr_db
    for one, other in (*zip(*rows, strict=True), *zip(*runs, strict=True)):
        # Where a graph is right, what is left differs with the order in which ONNX Runtime sums.
        assert abs(min(one.snr_db, 90) - min(other.snr_db, 90)) < 0.1, (one, other)


@pytest.mark.parametrize("count", range(9))
def test_halving_finds_the_first_of_all_and_asks_rarely(count: int) -> None:
    for first in range(count + 1):
        asked: list[int] = []

        def test(index: int, first: int = first, asked: list[int] = asked) -> bool:
            asked.append(index)
            return index >= first

        assert first_true(test, count) == first
        assert len(asked) <= count.bit_length()


@pytest.mark.slow
def test_what_cannot_be_bisected_is_refused_with_what_can_be_done(
    tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ("--engine", "--against x.json"):
        assert main(["bisect", str(tiny_export), *words.split()]) == 2
        assert "no engine is made of it" in capsys.readouterr().err
    foreign = tmp_path / "foreign.onnx"
    values = [helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph), foreign)
    assert main(["bisect", str(foreign)]) == 2
    assert "not made by fp4export" in capsys.readouterr().err
    shutil.copy(tiny_export, tmp_path / "alone.onnx")
    assert main(["bisect", str(tmp_path / "alone.onnx")]) == 2
    assert "no reference" in capsys.readouterr().err
    assert main(["bisect", str(tmp_path / "absent.onnx")]) == 2
    for name in ("x.bundle", "x.bundle/lowered.cpu.onnx"):
        capsys.readouterr()
        assert main(["bisect", str(tmp_path / name)]) == 2
        assert "NAME.work/lowered.TARGET.onnx" in capsys.readouterr().err
