"""The whole PixArt-α transformer in torch: BF16 eager and compiled, and with quantized linears by our kernels."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from exporter.calibration.scales import choose_scales
from exporter.plan import LayerPlan, Plan
from exporter.presets import PRESETS
from exporter.progress import Progress
from exporter.quantize import QuantizedWeight, quantize_model, round_to_nearest
from plugins.containers import INT8, multipliers
from plugins.formats import get_format
from tools.cpu_bench.model import CAPTION_TOKENS, random_pixart
from tools.gpu_bench.cases import FLOATS, WrongResultError
from tools.gpu_bench.page import StepRow
from tools.gpu_bench.timing import Clock

_LATENT = (2, 4, 64, 64)
_LEAST_DB = 10.0
"""The same model has 25.6 dB on a CPU with searched scales (docs/benchmarks.md); a wrong kernel leaves about 0."""


def measure_transformer(blocks: int, clock: Clock, progress: Progress) -> Iterator[StepRow]:
    """A step of guidance at 512 × 512: time and memory of each form. Raises `WrongResultError`."""
    device = torch.device("cuda")
    model = random_pixart(blocks)
    plan = linear_plan(model)
    weights = nearest_weights(model, plan, progress)
    base = model.to(FLOATS)
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(_LATENT, generator=generator).to(device, FLOATS),
        "encoder_hidden_states": torch.randn(2, CAPTION_TOKENS, 4096, generator=generator).to(device, FLOATS),
        "timestep": torch.full((2,), 500, device=device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    forms: dict[str, Callable[[], nn.Module]] = {
        "BF16 eager": lambda: copy.deepcopy(base).to(device),
        "W4A6, our kernels": lambda: quantize_model(base, plan, weights).to(device),
        "BF16 torch.compile": lambda: cast(nn.Module, torch.compile(copy.deepcopy(base).to(device))),
    }
    first: Tensor | None = None
    for name, make in forms.items():
        row, output = _measure(name, make, inputs, clock)
        first = output if first is None else first
        decibels = None if output is first else snr_db(first, output)
        if decibels is not None and not decibels >= _LEAST_DB:
            raise WrongResultError(f"{name}: {decibels:.1f} dB to BF16, less than {_LEAST_DB:.0f}")
        yield StepRow(name, *row, decibels)


def _measure(
    name: str, make: Callable[[], nn.Module], inputs: dict[str, Any], clock: Clock
) -> tuple[tuple[float, float, float, float], Tensor]:
    """(milliseconds as a graph, and launched from Python, gigabytes of the loaded model, peak gigabytes of a step) and
    the output."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        module = make()
        output: Tensor = module(**inputs)[0]
        torch.cuda.synchronize()
        loaded = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        module(**inputs)
        peak = torch.cuda.max_memory_allocated() - before
        launched = clock.launched_milliseconds(lambda: module(**inputs))
        graph = clock.milliseconds({name: lambda: module(**inputs)})[name]
    return (graph, launched, loaded / 1e9, peak / 1e9), output.float()


def linear_plan(model: nn.Module) -> Plan:
    """W4A6 for the linears of the blocks."""
    scheme = PRESETS["w4a6"]
    layers = tuple(
        LayerPlan(
            name,
            module.out_features,
            module.in_features,
            module.bias is not None,
            scheme.weight_format,
            scheme.activation_format,
            scheme.group_size,
            scheme.scales,
            INT8.name,
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("transformer_blocks.")
    )
    return Plan(layers=layers, high_precision=(), fp32_bytes=0, expected_bytes=0)


def nearest_weights(model: nn.Module, plan: Plan, progress: Progress) -> dict[str, QuantizedWeight]:
    """Every planned weight rounded to nearest on its largest magnitudes."""
    weights = {}
    with progress.task("weights", len(plan.layers)) as task:
        for layer in plan.layers:
            fmt, weight = get_format(layer.weight_format), model.get_submodule(layer.name).get_parameter("weight")
            scales = choose_scales(weight.detach(), fmt, layer.group_size, "absmax", None, multipliers(fmt, INT8))
            weights[layer.name] = round_to_nearest(weight.detach(), scales, fmt)
            task.advance()
    return weights


def snr_db(expected: Tensor, found: Tensor) -> float:
    """How far the error is below the signal."""
    error = (expected.double() - found.double()).square().mean()
    return float(10 * torch.log10(expected.double().square().mean() / error))
