"""What a compute type costs is measured on the torch model, which is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from exporter.compute import Compute
from exporter.gate.records import ROUNDING_MARGIN_DB, Reference
from exporter.gate.reference import record_reference
from exporter.gate.rounding import rounded, stored_in
from exporter.gate.whole import model_feeds
from exporter.progress import NullProgress
from tests.exporter.gate.test_gate_reference import ADAPTER, batches, original, quantize

__all__ = ["original"]


def _record(model: nn.Module, compute: Compute) -> Reference:
    return record_reference(model, quantize(model, "e2m3"), ADAPTER, batches(model), NullProgress(), compute)


@pytest.fixture(scope="module")
def fp16(original: nn.Module) -> Reference:
    return _record(original, "fp16")


@pytest.fixture(scope="module")
def bf16(original: nn.Module) -> Reference:
    return _record(original, "bf16")


def test_fp32_costs_nothing(original: nn.Module) -> None:
    reference = _record(original, "fp32")
    assert reference.rounding is None
    assert reference.for_stage("lowered") == reference.for_stage("exported") == reference


def test_bf16_costs_about_three_bits_more_than_fp16(fp16: Reference, bf16: Reference) -> None:
    assert fp16.rounding is not None
    assert bf16.rounding is not None
    outside = "blocks.timestep"
    assert 12 < fp16.rounding.boundaries[outside] - bf16.rounding.boundaries[outside] < 24
    assert 60 < fp16.rounding.boundaries[outside] < 80
    assert fp16.rounding.end_to_end_db > bf16.rounding.end_to_end_db > 25


def test_only_the_lowered_graph_is_held_to_the_rounded_model(bf16: Reference) -> None:
    lowered, exported = bf16.for_stage("lowered"), bf16.for_stage("exported")
    assert exported.rounding is None
    assert exported.thresholds == bf16.thresholds
    assert bf16.rounding is not None
    for name, limit in lowered.thresholds.items():
        assert limit == min(bf16.thresholds[name], bf16.rounding.boundaries[name] - ROUNDING_MARGIN_DB)
    assert lowered.end_to_end_threshold < exported.end_to_end_threshold


def test_inputs_are_numbers_of_the_type(bf16: Reference) -> None:
    for record in bf16.linears:
        x = torch.from_numpy(record.x)
        assert torch.equal(x, rounded(x, "bf16"))
    name = "transformer_blocks.0.output"
    stored = torch.from_numpy(model_feeds(bf16.for_stage("lowered"))[0][f"{name}.given"])
    exact = torch.from_numpy(model_feeds(bf16.for_stage("exported"))[0][f"{name}.given"])
    assert torch.equal(stored, rounded(exact, "bf16"))
    assert not torch.equal(stored, exact)


def test_the_model_is_left_as_it_was(original: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    with stored_in("bf16", original, ADAPTER.blocks(original)):
        assert not torch.equal(original.state_dict()["proj_out.weight"], before["proj_out.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in original.modules())


def test_the_timestep_itself_is_not_rounded(original: nn.Module) -> None:
    """BF16 has no 999: its sinusoids would be another timestep's."""
    seen: list[torch.Tensor] = []
    handle = original.adaln_single.emb.time_proj.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    with torch.no_grad(), stored_in("bf16", original, ADAPTER.blocks(original)):
        ADAPTER.forward(original, ADAPTER.example_inputs(original, batch=2, tokens=5)[:1])
    handle.remove()
    assert rounded(torch.tensor(999.0), "bf16") == 1000
    assert seen[0].dtype == torch.float32


def test_a_reference_with_rounding_is_saved_and_read_back(bf16: Reference, tmp_path: Path) -> None:
    bf16.save(tmp_path)
    assert Reference.load(tmp_path).rounding == bf16.rounding
