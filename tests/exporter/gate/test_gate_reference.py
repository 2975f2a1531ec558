"""What is recorded of the torch model: its own numbers, and how much they may be missed by."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from exporter.errors import FidelityError
from exporter.gate.records import LinearRecord, Reference
from exporter.gate.reference import EXACT_DB, record_reference
from exporter.gate.rows import PROBE_ROWS
from exporter.models.inputs import TransformerInputs
from exporter.models.pixart import PixArtAdapter
from exporter.plan import LayerPlan, Plan
from exporter.progress import NullProgress
from exporter.quantize import QuantLinear, quantize_model, round_to_nearest
from plugins.float_quantize.reference import quantize_online
from plugins.formats import get_format

ADAPTER = PixArtAdapter()
BLOCKS = ("transformer_blocks.0", "transformer_blocks.1")


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(2)
    model = PixArtTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        in_channels=2,
        out_channels=4,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    return model.eval().requires_grad_(False)


def quantize(model: nn.Module, activation: str, prefix: str = "transformer_blocks") -> nn.Module:
    layers, weights = [], {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith(prefix):
            n, k = linear.weight.shape
            layers.append(LayerPlan(name, n, k, linear.bias is not None, "e2m1", activation, 0, "channel", "int8"))
            weights[name] = round_to_nearest(linear.weight, linear.weight.abs().amax(1, True) / 6, get_format("e2m1"))
    return quantize_model(model, Plan(tuple(layers), (), 0, 0), weights)


def batches(model: nn.Module) -> list[TransformerInputs]:
    return [ADAPTER.example_inputs(model, batch=2, tokens=5)[torch.tensor([row])] for row in (0, 1)]


def record(original: nn.Module, quantized: nn.Module) -> Reference:
    return record_reference(original, quantized, ADAPTER, batches(original), NullProgress())


@pytest.fixture(scope="module")
def w4a6(original: nn.Module) -> nn.Module:
    return quantize(original, "e2m3")


@pytest.fixture(scope="module")
def reference(original: nn.Module, w4a6: nn.Module) -> Reference:
    return record(original, w4a6)


def test_every_quantized_linear_is_recorded_in_order(reference: Reference, w4a6: nn.Module) -> None:
    layers = [module.layer for module in w4a6.modules() if isinstance(module, QuantLinear)]
    assert sorted(layers) == sorted(record.layer for record in reference.linears)
    assert reference.linears[0].layer == "transformer_blocks.0.attn1.to_q"


def test_a_records_numbers_are_the_layers(reference: Reference, w4a6: nn.Module) -> None:
    for entry in reference.linears:
        values, scales = quantize_online(entry.x, get_format("e2m3"))
        assert np.array_equal(entry.values, values)
        assert np.array_equal(entry.scales, scales)
        module = w4a6.get_submodule(entry.layer)
        assert np.array_equal(entry.y, module(torch.from_numpy(entry.x)).numpy())
        assert np.array_equal(entry.bias, module.bias.numpy())
        assert entry.rank == 3
        assert 0 < entry.noise_floor.max() < 1e-4 * np.abs(entry.y).mean()


def test_captured_rows_are_the_models_own_inputs(reference: Reference) -> None:
    (text,) = [one for one in reference.linears if one.layer == "transformer_blocks.1.attn2.to_k"]
    captured = [model.boundaries["blocks.encoder_hidden_states"].reshape(-1, 32) for model in reference.models]
    assert np.array_equal(text.x[: -text.probes], np.concatenate(captured))


def test_layers_that_share_an_input_share_rows_and_probes(reference: Reference) -> None:
    by_name: dict[str, LinearRecord] = {one.layer: one for one in reference.linears}
    query, key = (by_name[f"transformer_blocks.1.attn1.{name}"] for name in ("to_q", "to_k"))
    assert np.array_equal(query.x, key.x)
    probes = query.x[-PROBE_ROWS:]
    assert (np.abs(probes) >= 0.49 * np.abs(probes).max()).all()


def test_boundaries_are_what_flows_between_the_blocks(reference: Reference, w4a6: nn.Module) -> None:
    names = [f"{BLOCKS[0]}.input", *(f"blocks.{key}" for key in ("encoder_hidden_states", "timestep"))]
    names += [f"{block}.output" for block in BLOCKS] + ["sample"]
    for model in reference.models:
        assert set(names) <= set(model.boundaries)
        inputs = {name: torch.from_numpy(array) for name, array in model.inputs.items()}
        output = ADAPTER.forward(w4a6, TransformerInputs.from_dict(inputs))
        assert np.array_equal(model.boundaries["sample"], output.numpy())
    assert set(reference.thresholds) == set(reference.models[0].boundaries)


def test_a_block_gives_the_same_bits_whenever_it_is_given_its_inputs(original: nn.Module, w4a6: nn.Module) -> None:
    """So the reference takes what it gave for what it would give while the model around it is shaken."""
    calls = []
    block = w4a6.get_submodule(BLOCKS[1])
    keep = block.register_forward_hook(lambda _block, *call: calls.append(call), with_kwargs=True)
    ADAPTER.forward(w4a6, batches(original)[0])
    keep.remove()
    ((args, kwargs, output),) = calls
    assert torch.equal(block(*args, **kwargs), output)


def test_limits_follow_from_the_quantization_error(reference: Reference) -> None:
    assert all(20 < reference.thresholds[f"{block}.output"] < 80 for block in BLOCKS)
    assert reference.end_to_end_threshold == pytest.approx(reference.quantization_db + 10)
    # Nothing is quantized before and after the blocks.
    for name in (f"{BLOCKS[0]}.input", "blocks.timestep", "sample"):
        assert 85 < reference.thresholds[name] <= EXACT_DB


def test_a_weight_only_model_is_held_to_float_precision(original: nn.Module) -> None:
    reference = record(original, quantize(original, "none"))
    assert all(one.values is None and one.scales is None for one in reference.linears)
    assert all(reference.thresholds[f"{block}.output"] == EXACT_DB for block in BLOCKS)
    assert 90 < reference.end_to_end_threshold <= EXACT_DB


def test_a_block_that_is_not_quantized_is_held_to_float_precision(original: nn.Module) -> None:
    reference = record(original, quantize(original, "e2m3", BLOCKS[0]))
    assert reference.thresholds[f"{BLOCKS[0]}.output"] < 80
    assert reference.thresholds[f"{BLOCKS[1]}.output"] == EXACT_DB


def test_a_reference_that_is_not_finite_is_refused(original: nn.Module) -> None:
    broken = quantize(original, "e2m3")
    broken.get_submodule("transformer_blocks.1.ff.net.2").bias.data[0] = torch.nan
    with pytest.raises(FidelityError, match=r"transformer_blocks\.1\.output"):
        record(original, broken)
    for module in original.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
