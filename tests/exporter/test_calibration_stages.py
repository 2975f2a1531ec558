"""What the stages of calibration leave in the work folder, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.calibration_stages import calibrated_weights, captured_inputs, formats_chosen
from exporter.errors import InputError
from exporter.job import open_job
from exporter.model_stages import transformed
from exporter.progress import NullProgress
from exporter.recipe import load_recipe
from exporter.shards import Shard
from exporter.source import load_source


@pytest.mark.slow
def test_targets_with_other_group_multipliers_keep_their_own_weights(tiny_job: Path, tmp_path: Path) -> None:
    work = tmp_path / "x.work"
    multipliers, written = [], []
    for target, output in (("cpu", "x.onnx"), ("rtx-sm89", "x.plan"), ("rtx-sm120", "x.plan"), ("cpu", "x.onnx")):
        recipe = load_recipe(tiny_job / "tiny.yaml", ["preset=w4a8", "method.name=rtn"], target)
        progress = NullProgress()
        job = open_job(recipe, tmp_path / output, work, fresh=False, keep_graphs=False, progress=progress)
        source = load_source(job)
        multipliers.append({layer.multipliers for layer in source.plan.layers})
        calibrated_weights(job, source, captured_inputs(job, source))
        written.append({path.name: path.stat().st_mtime_ns for path in work.glob("quantized.*.safetensors")})
    assert multipliers[0] != multipliers[1] == multipliers[2], "else this test says nothing"
    assert [len(files) for files in written] == [1, 2, 2, 2]
    assert written[0].items() <= written[1].items() == written[2].items() == written[3].items()


@pytest.mark.slow
def test_another_method_s_weights_do_not_replace_finished_ones(tiny_job: Path, tmp_path: Path) -> None:
    def weights(*changes: str) -> dict[str, bytes]:
        recipe = load_recipe(tiny_job / "tiny.yaml", ("method.name=rtn", *changes), "cpu")
        output, progress = tmp_path / "x.onnx", NullProgress()
        job = open_job(recipe, output, tmp_path / "x.work", fresh=False, keep_graphs=False, progress=progress)
        source = load_source(job)
        calibrated_weights(job, source, captured_inputs(job, source))
        return {path.name: path.read_bytes() for path in (tmp_path / "x.work").glob("quantized.*.safetensors")}

    finished = weights("method.scale_search=mse")
    both = weights("method.scale_search=absmax")
    assert len(finished) == 1
    assert len(both) == 2
    assert finished.items() < both.items()
    assert weights("method.scale_search=mse") == both


@pytest.mark.slow
@pytest.mark.parametrize(
    ("match", "shift", "message"),
    [
        ("*.ff.net.2", "gelu", ""),
        (
            "*.ff.net.2",
            "none",
            r"blocks\.0\.ff\.net\.2: `activation: ue2m4` has no sign, .* to -0\.1.*add `shift: gelu`",
        ),
        ("*.attn2.to_q", "gelu", r"blocks\.0\.attn2\.to_q: .* no GELU makes them: drop `shift: gelu` and use"),
    ],
)
def test_captured_inputs_below_zero_are_refused_without_a_sign(
    tiny_job: Path, begin: Callable[..., Path], tmp_path: Path, match: str, shift: str, message: str
) -> None:
    rule = f'{{match: "{match}", group: 32, activation: ue2m4, shift: {shift}}}'
    changes = [
        f'layers=[{rule}, {{match: "transformer_blocks.*", group: 32}}]',
        "method.name=rtn",
        "method.scale_search=absmax",
    ]
    recipe, progress = load_recipe(tiny_job / "tiny.yaml", changes, "cpu"), NullProgress()
    begin(tmp_path / "x.work")
    job = open_job(recipe, tmp_path / "x.onnx", None, fresh=False, keep_graphs=False, progress=progress)
    source = load_source(job)
    captured = captured_inputs(job, source)
    with pytest.raises(InputError, match=message) if message else nullcontext():
        calibrated_weights(job, transformed(job, source), captured)


def test_formats_are_chosen_once_and_by_the_first_process(tiny_job: Path, tmp_path: Path) -> None:
    changes = ["method.name=rtn", "layers.0.weight=auto", "calibration.samples=1"]
    recipe, progress = load_recipe(tiny_job / "tiny.yaml", changes, "cpu"), NullProgress()
    job = open_job(recipe, tmp_path / "x.onnx", None, fresh=False, keep_graphs=False, progress=progress)
    source = load_source(job)
    captured = captured_inputs(job, source)
    chosen = formats_chosen(job, source, captured)
    assert [layer.layer for layer in chosen.formats] == [layer.name for layer in source.plan.open]
    for layer in chosen.formats:
        assert list(layer.errors) == ["e2m1", "e1m2", "e3m0"]
        assert chosen.plan.layer(layer.layer).weight_format == min(layer.errors, key=lambda fmt: layer.errors[fmt])
    assert not chosen.plan.open
    (file,) = (tmp_path / "x.work").glob("formats.*.json")
    written = file.stat().st_mtime_ns
    for again in (job, replace(job, shard=Shard(1, 2))):
        assert formats_chosen(again, source, captured).formats == chosen.formats
    assert file.stat().st_mtime_ns == written
    # Another rounding to begin with has other errors.
    searched = replace(job, recipe=load_recipe(tiny_job / "tiny.yaml", [*changes, "method.scale_search=absmax"], "cpu"))
    assert formats_chosen(searched, source, captured).formats != chosen.formats


def test_a_rule_that_says_nothing_of_outputs_leaves_the_key_of_calibrations_as_it_was(
    tiny_job: Path, tmp_path: Path
) -> None:
    found = []
    for rule in ("", ", output: none", ", output: e4m3", ", output: e4m3, output_group: 32"):
        rules = f'{{match: "transformer_blocks.*", group: 32{rule}}}'
        recipe = load_recipe(tiny_job / "tiny.yaml", [f"layers=[{rules}]", "method.name=rtn"], "cpu")
        job = open_job(recipe, tmp_path / "x.onnx", None, fresh=False, keep_graphs=False, progress=NullProgress())
        found.append(load_source(job).layer_facts())
    assert found[0] == found[1]
    assert not any(key.startswith("output") for facts in found[0] for key in facts)
    assert found[0] != found[2] != found[3]
