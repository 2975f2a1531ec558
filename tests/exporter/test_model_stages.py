"""What changes the model before it is quantized: found once, and nothing of it in the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exporter.calibration_stages import captured_inputs
from exporter.job import open_job
from exporter.model_stages import balanced, transformed
from exporter.progress import NullProgress
from exporter.recipe import load_recipe
from exporter.shards import Shard
from exporter.source import load_source
from exporter.stage_files import weights_file


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
    (balance,) = (tmp_path / "x.work").glob("balance.*.safetensors")
    written = balance.stat().st_mtime_ns
    again = balanced(job, original, captured)
    assert torch.equal(again.model.adaln_single.linear.bias, source.model.adaln_single.linear.bias)
    assert balance.stat().st_mtime_ns == written


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
    key = weights_file(job, original).key
    assert weights_file(job, first).key == key
    file.write_bytes(b"others")
    assert weights_file(job, original).key != key
