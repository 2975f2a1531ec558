"""The page of paper figures is what the tool computes, and the tool computes what can be done by hand."""

from __future__ import annotations

import pytest

from tools.roofline import is_current, t5_parameters
from tools.scaling.hardware import GPUS, Gpu
from tools.scaling.workload import BF16, MODELS, W4, W8, Linear, attention_operations, linears, parameters, seconds


def test_the_page_is_current() -> None:
    assert is_current()


def test_the_largest_orin_has_its_published_rate() -> None:
    orin = next(gpu for gpu in GPUS if gpu.name == "AGX Orin 64 GB")
    assert orin.int8 == pytest.approx(170 / 2, rel=0.01)


def test_parameters_are_the_published_ones() -> None:
    """PixArt-α has 0.6 billion, Hunyuan-DiT 1.5; T5 1.1 XXL's encoder has 4.76."""
    totals = {model.family: sum(parameters(model)) / 1e9 for model in MODELS}
    assert totals["pixart"] == pytest.approx(0.61, abs=0.01)
    assert totals["hunyuan"] == pytest.approx(1.5, abs=0.05)
    assert t5_parameters(4096, 10240, 32128, heads=64) / 1e9 == pytest.approx(4.76, abs=0.01)


def test_operations_of_pixarts_blocks() -> None:
    """Per block: four projections and two of the feed-forward for image tokens, queries and outputs of the
    cross-attention too, keys and values of the caption."""
    model = MODELS[0]
    width, image, text = model.width, model.tokens, 2 * model.text_tokens
    block = 2 * width * width * (image * (4 + 8 + 2) + text * 2)
    assert sum(linear.operations for linear in linears(model) if linear.quantized) == model.blocks * block
    assert attention_operations(model) == model.blocks * 4 * 2048 * (1024 + 120) * width


def test_a_gpu_without_memory_limits_is_as_fast_as_its_tensor_cores() -> None:
    model = MODELS[0]
    gpu = Gpu("g", 1, 1e12, 100, 200, None, "")
    total, at_memory = seconds(model, BF16, gpu)
    operations = sum(linear.operations for linear in linears(model)) + attention_operations(model)
    assert total == pytest.approx(operations / 100e12)
    assert at_memory == 0
    assert seconds(model, W4, gpu)[0] < 0.6 * total


def test_weights_of_four_bits_are_half_of_eight() -> None:
    linear = Linear(1, 1152, 4608, quantized=True, shares_input=False)
    assert W8.weight_bytes(linear) == 1152 * 4608 + 4 * 1152
    assert W4.weight_bytes(linear) == 1152 * (4608 / 2 + 4608 / 128 + 4)
