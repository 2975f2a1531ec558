"""Inputs behind a GELU, raised above 0 and quantized without a sign: the constant, and the whole way to the gate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from exporter.calibration.nearest import nearest_weight
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.emulate import emulation_passes
from exporter.passes.layer_table import read_layer_table
from exporter.plan import LayerPlan, Plan
from exporter.progress import NullProgress
from exporter.quantize import quantize_model
from exporter.rounding import InputQuantizer
from exporter.targets import TARGETS
from exporter.to_onnx import to_onnx
from exporter.transforms.apply import with_transforms
from exporter.transforms.linear import SHIFTS, TransformedLinear
from exporter.transforms.low_rank import factorize
from exporter.validate import captured_batches, validate_graphs
from plugins.formats import get_format
from tests.exporter.validated_export import ADAPTER, TOKENS, captured_inputs, tiny_pixart, two_prompts

FED = "transformer_blocks.0.ff.net.2"


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_gelu_reaches_the_shift_but_not_below(approximate: str) -> None:
    shift, x = SHIFTS["gelu"], torch.linspace(-10, 0, 1_000_001, dtype=torch.float64)
    least = F.gelu(x, approximate=approximate).min().item()
    assert 0 < least + shift < 1e-3
    assert torch.tensor(shift).half().item() == torch.tensor(shift).bfloat16().item() == shift


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_output_stays(rank: int, bias: bool) -> None:
    torch.manual_seed(0)
    original = nn.Linear(32, 24, bias=bias)
    branch = factorize(original.weight.detach(), rank) if rank else None
    changed = TransformedLinear(original, low_rank=branch, shift=SHIFTS["gelu"])
    seen = {}
    changed.linear.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    x = F.gelu(torch.randn(2, 5, 32))
    torch.testing.assert_close(changed(x), original(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(seen["x"], x + SHIFTS["gelu"])
    assert not any(parameter.requires_grad for parameter in changed.parameters())


@pytest.mark.parametrize(("unsigned", "signed"), [("ue2m4", "e2m3"), ("ue2m2", "e2m1")])
def test_what_it_is_for(unsigned: str, signed: str) -> None:
    """Twice the codes where all of them are used: an error of half the size, less what the shift costs."""
    x = F.gelu(torch.randn(200, 256, generator=torch.Generator().manual_seed(0)))
    shift = SHIFTS["gelu"]
    shifted = InputQuantizer(get_format(unsigned)).fake_quantize(x + shift) - shift
    errors = [(found - x).square().mean() for found in (shifted, InputQuantizer(get_format(signed)).fake_quantize(x))]
    assert errors[0] < errors[1] / 2


@dataclass(frozen=True)
class Traced:
    """One block with a shifted layer, the same quantized, and its traced graph."""

    layer: str
    original: nn.Module
    quantized: nn.Module
    path: Path


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    path, model = tmp_path_factory.mktemp("shift") / "traced.onnx", tiny_pixart()
    model.transformer_blocks = model.transformer_blocks[:1]
    n, k = model.get_submodule(FED).weight.shape
    layer = LayerPlan(f"{FED}.linear", n, k, True, "e2m1", "ue2m4", 32, "foldable", "int8", shift="gelu")
    changed = with_transforms(model, [layer], {})
    weight = nearest_weight(changed.get_submodule(layer.name).weight, layer, None, "absmax")
    quantized = quantize_model(changed, Plan((layer,), (), 0, 0), {layer.name: weight})
    to_onnx(quantized, ADAPTER, ADAPTER.example_inputs(quantized, 2, TOKENS), path)
    return Traced(layer.name, changed, quantized, path)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "encoding"), [("cpu", "uint8"), ("rtx-sm89", "int8")])
def test_codes_are_exact_on_every_way_to_the_engine(traced: Traced, tmp_path: Path, target: str, encoding: str) -> None:
    device = TARGETS[target]
    exported, _ = run_passes(onnx.load(traced.path), WAIST_PASSES, device)
    lowered, _ = run_passes(exported, (*lowering_passes(device), *emulation_passes(device)), device)
    (entry,) = read_layer_table(lowered)
    assert (entry.layer, entry.container, entry.encoding) == (traced.layer, "int8", encoding)
    paths = [tmp_path / f"{name}.onnx" for name in ("exported", "lowered")]
    for path, graph in zip(paths, (exported, lowered), strict=True):
        onnx.save(graph, path)
    batches = captured_batches(captured_inputs(steps=1), two_prompts())
    models = (traced.original, traced.quantized, ADAPTER, batches)
    result, _ = validate_graphs(*models, *paths, tmp_path / "gate", device, NullProgress())
    rows = [row for row in result.rows if row.kind == "linear"]
    assert [(row.name, row.code_mismatches) for row in rows] == [(traced.layer, 0)] * 2
    assert all(row.code_count and row.snr_db > 100 for row in rows)
