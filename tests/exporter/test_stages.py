"""What stages leave in the work folder and what they add to the graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exporter.calibration_stages import formats_chosen
from exporter.errors import InputError
from exporter.job import open_job
from exporter.model_stages import balanced, transformed
from exporter.progress import NullProgress, Progress
from exporter.recipe import load_recipe
from exporter.shards import Shard
from exporter.source import load_source
from exporter.stages import calibrated_weights, calibration_key, captured_inputs
from tests.exporter.progresses import InterruptedProgress


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


def test_an_interrupted_calibration_is_in_nobody_s_way_who_has_nothing_to_calibrate(
    tiny_job: Path, tmp_path: Path
) -> None:
    """As in a sweep, and in a bundle's second target, whose multipliers are others."""
    work = tmp_path / "x.work"
    made = {}

    def weights(name: str, *changes: str, progress: Progress | None = None) -> None:
        recipe = load_recipe(
            tiny_job / "tiny.yaml", ("method.name=gptq", "method.scale_search=absmax", *changes), "cpu"
        )
        output, progress = tmp_path / "x.onnx", progress or NullProgress()
        job = open_job(recipe, output, work, fresh=False, keep_graphs=False, progress=progress)
        source = load_source(job)
        captured = captured_inputs(job, source)
        source = formats_chosen(job, balanced(job, source, captured), captured)
        calibrated_weights(job, source, captured)
        made[name] = {path: path.stat().st_mtime_ns for path in work.glob("quantized.*.safetensors")}

    finished = "method.balance=true", "layers.0.weight=auto"
    weights("finished", *finished)
    with pytest.raises(KeyboardInterrupt):
        weights("killed", "calibration.steps=2", progress=InterruptedProgress(2 + 20))
    assert len(list(work.glob("unfinished.*/*.seal"))) == 1
    weights("again", *finished)
    assert made["again"] == made["finished"]
    for changes in (
        ["preset=w4a8_int"],
        ["layers.0.weight=auto", "calibration.steps=2"],
        [*finished, "method.start=gptq"],
    ):
        with pytest.raises(
            InputError, match=r"finished units: 1, had .*(calibration\.steps 2, not 3|weight e\dm\d, not)"
        ):
            weights("refused", *changes)
    assert len(list(work.glob("unfinished.*/*.seal"))) == 1
    weights("killed", "calibration.steps=2")
    assert len(made["killed"]) == 2
    assert not any(work.glob("unfinished.*"))
    weights("preset", "preset=w4a8_int")
    assert len(made["preset"]) == 3


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


@pytest.mark.slow
def test_balanced_inputs_add_nothing_to_the_graph(tiny_job: Path, begin: Callable[..., Path], tmp_path: Path) -> None:
    """A graph is traced from modules, parameters and buffers, and balancing changes nothing but numbers in them."""
    recipe = load_recipe(tiny_job / "tiny.yaml", ["method.balance=true"], "cpu")
    progress = NullProgress()
    begin(tmp_path / "x.work")
    job = open_job(recipe, tmp_path / "x.onnx", None, fresh=False, keep_graphs=False, progress=progress)
    original = load_source(job)
    captured = captured_inputs(job, original)
    source = balanced(job, original, captured)
    forms = [
        (
            [(name, type(module), module.extra_repr()) for name, module in model.named_modules()],
            [(name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict(keep_vars=True).items()],
            [(name, tensor.shape, tensor.dtype) for name, tensor in model.named_buffers()],
        )
        for model in (source.model, original.model)
    ]
    assert forms[0] == forms[1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in source.model.modules())
    assert not torch.equal(source.model.adaln_single.linear.bias, original.model.adaln_single.linear.bias)
    written = (tmp_path / "x.work" / "balance.safetensors").stat().st_mtime_ns
    again = balanced(job, original, captured)
    assert torch.equal(again.model.adaln_single.linear.bias, source.model.adaln_single.linear.bias)
    assert (tmp_path / "x.work" / "balance.safetensors").stat().st_mtime_ns == written


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


def test_branches_of_low_rank_are_found_once_and_read_by_the_other_processes(tiny_job: Path, tmp_path: Path) -> None:
    rules = '{match: "*.ff.net.2", group: 32, low_rank: 4, hadamard: 16}, {match: "transformer_blocks.*", group: 32}'
    recipe = load_recipe(tiny_job / "tiny.yaml", [f"layers=[{rules}]", "method.name=rtn"], "cpu")
    job = open_job(recipe, tmp_path / "x.onnx", None, fresh=False, keep_graphs=False, progress=NullProgress())
    original = load_source(job)
    first = transformed(job, original)
    (file,) = (tmp_path / "x.work").glob("low_rank.*.safetensors")
    written = file.stat().st_mtime_ns
    second = transformed(replace(job, shard=Shard(1, 2)), original)
    again = transformed(job, original)
    assert file.stat().st_mtime_ns == written
    for name, tensor in first.model.state_dict().items():
        for other in (second, again):
            assert torch.equal(other.model.state_dict()[name], tensor)
    name = "transformer_blocks.0.ff.net.2"
    assert original.model.get_submodule(name).weight.shape == first.model.get_submodule(f"{name}.linear").weight.shape
    example = original.example_inputs(batch=2)
    torch.testing.assert_close(first.denoiser(example), original.denoiser(example), rtol=1e-4, atol=1e-5)
    # Weights that were calibrated beside these branches are not for others.
    key = calibration_key(job, original)
    assert calibration_key(job, first) == key
    file.write_bytes(b"others")
    assert calibration_key(job, original) != key
