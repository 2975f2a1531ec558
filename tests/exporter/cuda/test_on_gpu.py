"""The kernels on a real GPU, against their references. Skipped without one."""

from __future__ import annotations

import copy

import pytest
import torch

from exporter.calibration.gptq import ErrorFeedback, round_columns
from exporter.calibration.scales import choose_scales
from exporter.cuda.launcher import launcher_of
from exporter.plan import LayerPlan
from exporter.quantize import QuantLinear, expand_scales
from plugins.formats import WEIGHT_FORMATS, get_format
from plugins.kernels.hardware import HARDWARE
from tests.exporter.cuda.test_kernel_linear import CHANNELS, SIX_BITS, W4A6, W4A8, layer_of, snr_db
from tools.gpu_bench.cases import SCHEMES, Case
from tools.gpu_bench.linears import check_tactics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability(0) not in HARDWARE,
        reason="needs an NVIDIA GPU that kernels are made for, and there is none",
    ),
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 200, 256), (37, 136, 384), (300, 72, 128)])
def test_every_tactic_computes_what_the_reference_does(scheme: str, shape: tuple[int, int, int]) -> None:
    launcher = launcher_of(0)
    case = Case.random(scheme, *shape, capability=launcher.capability, device=torch.device("cuda"))
    check_tactics(case, launcher)


@pytest.mark.parametrize(("plan", "least_db"), [(W4A6, 110), (CHANNELS, 110), (W4A8, 60), (SIX_BITS, 60)])
def test_a_layer_on_the_gpu_is_the_layer_on_the_cpu(plan: LayerPlan, least_db: float) -> None:
    """INT8 sums are exact; Hopper's tensor cores add FP8 products with few bits."""
    layer = layer_of(plan)
    x = torch.randn(2, 33, layer.in_features, generator=torch.Generator().manual_seed(1))
    moved = copy.deepcopy(layer).cuda()
    assert snr_db(layer(x), moved(x.cuda()).cpu()) > least_db


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_error_feedback_on_the_gpu_is_bitwise_that_on_the_cpu(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, 256, generator=generator) for size in (300, 2000))
    fmt, feedback = get_format(name), ErrorFeedback.of((x + x.roll(1, 1)).T @ (x + x.roll(1, 1)))
    scales = choose_scales(weight, fmt, 128, "absmax") * 0.9
    moved = ErrorFeedback(feedback.gram.cuda(), feedback.factor.cuda(), feedback.order.cuda())
    part = slice(0, 100)
    arguments = weight.double()[:, part], expand_scales(scales, 256)[:, part].double(), feedback.factor[part, part]
    found = round_columns(*(tensor.cuda() for tensor in arguments), fmt)
    for one, other in zip(round_columns(*arguments, fmt), found, strict=True):
        assert torch.equal(one, other.cpu())
    # Columns behind these learn of them by a product, whose sums have an order of their own.
    differ = feedback.round(weight, scales, fmt) != moved.round(weight.cuda(), scales.cuda(), fmt).cpu()
    assert float(differ.float().mean()) < 1e-3


def test_the_gpu_keeps_the_packed_weight_alone() -> None:
    layer = layer_of(W4A6).cuda()
    layer(torch.randn(4, layer.in_features, device="cuda"))
    assert layer.words.device.type == "cpu"
    assert layer.cpu().scales.device.type == "cpu"


def test_compiled_models_and_gradients_see_the_reference() -> None:
    layer = layer_of(W4A6).cuda()
    assert isinstance(layer, QuantLinear)
    x = torch.randn(4, layer.in_features, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert snr_db(layer(x), torch.compile(layer)(x)) > 90
