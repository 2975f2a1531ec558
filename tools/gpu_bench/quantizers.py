"""Quantizers on the GPU, beside the copy bandwidth that they are held against and torch's LayerNorm."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from exporter.cuda.launcher import Launcher
from exporter.rounding import round_to_format
from plugins.kernels.hardware import hardware_of
from plugins.norm_quantize.descriptor import NormQuantize
from plugins.norm_quantize.reference import EPSILON, modulated_norm
from plugins.token_quantize.descriptor import TokenQuantize
from plugins.token_quantize.reference import container_numbers, quantize_tokens
from tools.gpu_bench.cases import FLOATS, WrongResultError, to_numpy
from tools.gpu_bench.linears import launch
from tools.gpu_bench.page import QuantizerRow
from tools.gpu_bench.timing import Clock

_SAMPLES = 2
_CHECKED_ROWS = 64
_MOST_DIFFERING = 1e-3
"""Of a normalized row's numbers: those that lie within a rounding of a midpoint."""


def measure_quantizer(rows: int, k: int, format_name: str, launcher: Launcher, clock: Clock) -> QuantizerRow:
    """The token quantizer and the one behind a modulated LayerNorm, each by its best tactic, after a check."""
    device = torch.device("cuda")
    container = "int8" if format_name == "e2m3" else "fp8" if hardware_of(launcher.capability).has_fp8 else "fp16"
    generator = torch.Generator(device).manual_seed(rows + k)
    x = torch.randn(_SAMPLES, rows // _SAMPLES, k, device=device, generator=generator).to(FLOATS)
    scale, shift = (torch.randn(_SAMPLES, 1, k, device=device, generator=generator).to(FLOATS) for _ in range(2))
    plain = TokenQuantize(format_name, container, "bf16", k)
    fused = NormQuantize(format_name, container, "bf16", k)
    works = {
        f"{variant.NAME} t{tactic}": partial(launch, launcher, variant, tactic, inputs)
        for variant, inputs in ((plain, [x]), (fused, [x, scale, shift]))
        for tactic in range(len(launcher.tactics(variant)))
    }
    for name, work in works.items():
        numbers, scales = work()
        if name.startswith(plain.NAME):
            _check_plain(plain, x, numbers, scales)
        else:
            _check_fused(fused, (x, scale, shift), numbers, scales)
    norm = {"norm": lambda: F.layer_norm(x, (k,), eps=EPSILON)}
    times = clock.milliseconds({**works, **norm})
    best = {
        variant.NAME: min((time, name) for name, time in times.items() if name.startswith(variant.NAME))
        for variant in (plain, fused)
    }
    traffic = rows * (k * (x.element_size() + 1) + 4)
    return QuantizerRow(
        format=format_name,
        rows=rows,
        k=k,
        best_tactics=(best[plain.NAME][1][-2:], best[fused.NAME][1][-2:]),
        quantize_ms=best[plain.NAME][0],
        of_copy_bandwidth=traffic / best[plain.NAME][0] / clock.copy_bandwidth(),
        fused_ms=best[fused.NAME][0],
        norm_ms=times["norm"],
    )


def _check_plain(variant: TokenQuantize, x: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor) -> None:
    tokens = [to_numpy(tensor).reshape(-1, tensor.shape[-1])[:_CHECKED_ROWS] for tensor in (x, numbers, scales)]
    expected = quantize_tokens(tokens[0].astype("float32"), variant.number_format, variant.container)
    for name, right, found in zip(("numbers", "scales"), expected, tokens[1:], strict=True):
        if right.tobytes() != found.tobytes():
            raise WrongResultError(f"{variant.op_type}: {name} are not the reference's")


def _check_fused(
    variant: NormQuantize, inputs: tuple[torch.Tensor, ...], numbers: torch.Tensor, scales: torch.Tensor
) -> None:
    """Sums have an order of their own: scales to float32's roundings, numbers but for those next to a midpoint."""
    x, scale, shift = (to_numpy(tensor).astype("float32") for tensor in inputs)
    normalized = modulated_norm(x[:, :_CHECKED_ROWS], scale, shift)
    found = to_numpy(scales)[:, :_CHECKED_ROWS]
    right = quantize_tokens(normalized, variant.number_format, variant.container)[1]
    if not bool((abs(found / right - 1) < 1e-5).all()):
        raise WrongResultError(f"{variant.op_type}: scales are not the reference's")
    values = round_to_format(torch.from_numpy(normalized / found), variant.number_format).add_(0.0).numpy()
    expected = container_numbers(values, variant.number_format, variant.container)
    differing = (expected.view("uint8") != to_numpy(numbers)[:, :_CHECKED_ROWS].view("uint8")).mean()
    if differing > _MOST_DIFFERING:
        raise WrongResultError(f"{variant.op_type}: {differing:.2%} of the numbers are not the reference's")
