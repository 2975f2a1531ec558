"""Linears on the GPU: ours, alone and with their quantizer, torch's BF16, and the libraries' 8-bit products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.cuda.launcher import Launcher, default_tactic
from plugins.packed_linear.descriptor import PackedLinear
from plugins.tensorrt_plugins.variant import PluginVariant
from plugins.token_quantize.descriptor import TokenQuantize
from tools.gpu_bench.cases import Case
from tools.gpu_bench.page import LinearRow
from tools.gpu_bench.timing import Clock, Work

_LEAST_INT_MM_ROWS = 17
"""torch._int_mm takes more than 16 tokens."""


def launch(launcher: Launcher, variant: PluginVariant, tactic: int, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """One tactic on the current stream."""
    outputs = launcher.allocate(variant, inputs[0])
    launcher.launch(variant, tactic, inputs, outputs, torch.cuda.current_stream().cuda_stream)
    return outputs


def check_tactics(case: Case, launcher: Launcher) -> None:
    """Run every tactic of the case's quantizer and product once. Raises `WrongResultError` for the first wrong one."""
    quantizer, product = _operators(case)
    constants = case.kernels.operands(case.x, partial(_first_tactic, launcher))[2:]
    for quantizer_tactic in range(len(launcher.tactics(quantizer))):
        operands = [*launch(launcher, quantizer, quantizer_tactic, [case.x]), *constants]
        # Every product on the first quantizer's numbers, the first product on all.
        for tactic in range(len(launcher.tactics(product)) if quantizer_tactic == 0 else 1):
            [y] = launch(launcher, product, tactic, operands)
            case.check(operands, y)


def measure_linear(case: Case, launcher: Launcher, clock: Clock) -> LinearRow:
    """Times of everything at the case's shape, after every tactic is checked."""
    check_tactics(case, launcher)
    quantizer, product = _operators(case)
    operands = case.kernels.operands(case.x, partial(_first_tactic, launcher))
    tactics = {
        f"t{index}": partial(launch, launcher, product, index, operands)
        for index in range(len(launcher.tactics(product)))
    }
    quantizers = {
        f"t{index}": partial(launch, launcher, quantizer, index, [case.x])
        for index in range(len(launcher.tactics(quantizer)))
    }
    alone, quantizing = clock.milliseconds(tactics), clock.milliseconds(quantizers)
    best, best_quantizer = min(alone, key=alone.__getitem__), min(quantizing, key=quantizing.__getitem__)

    def both() -> object:
        made = launch(launcher, quantizer, int(best_quantizer[1:]), [case.x])
        return launch(launcher, product, int(best[1:]), [*made, *operands[2:]])

    libraries, missing = library_products(case)
    times = clock.milliseconds({"ours": tactics[best], "both": both, **libraries})
    return LinearRow(
        scheme=case.scheme,
        rows=case.rows,
        n=case.n,
        k=case.k,
        container=product.container,
        best_tactic=int(best[1:]),
        default_tactic=default_tactic(launcher.tactics(product), case.rows),
        default_ms=alone[f"t{default_tactic(launcher.tactics(product), case.rows)}"],
        gemm_ms=times["ours"],
        with_quantizer_ms=times["both"],
        bf16_ms=times["BF16"],
        library_ms={name: times[name] for name in libraries if name != "BF16"},
        missing=missing,
    )


def library_products(case: Case) -> tuple[dict[str, Work], dict[str, str]]:
    """torch's products at the case's shape that run here, and why the others do not."""
    bias = torch.zeros(case.n, device=case.x.device, dtype=case.x.dtype)
    works: dict[str, Work] = {"BF16": lambda: F.linear(case.x, case.weight, bias)}
    missing = {}
    makers: dict[str, Callable[[], Work]] = {"FP8": lambda: _scaled_mm(case), "INT8": lambda: _int_mm(case)}
    for name, make in makers.items():
        try:
            work = make()
            work()
            works[name] = work
        except (RuntimeError, ValueError) as error:
            missing[name] = str(error).splitlines()[0]
    return works, missing


def _scaled_mm(case: Case) -> Work:
    """FP8 with a scale per token and per channel, BF16 results."""
    x = (case.x / case.x.abs().amax(dim=1, keepdim=True)).to(torch.float8_e4m3fn)
    weight = case.weight.to(torch.float8_e4m3fn)
    x_scales = torch.ones(case.rows, 1, device=x.device)
    weight_scales = torch.ones(1, case.n, device=x.device)
    return lambda: torch._scaled_mm(x, weight.t(), x_scales, weight_scales, out_dtype=case.x.dtype)


def _int_mm(case: Case) -> Work:
    """INT8 with INT32 results, without scales: less than ours does."""
    if case.rows < _LEAST_INT_MM_ROWS:
        raise ValueError(f"torch._int_mm takes {_LEAST_INT_MM_ROWS} tokens or more")
    x = torch.randint(-60, 61, (case.rows, case.k), dtype=torch.int8, device=case.x.device)
    weight = torch.randint(-12, 13, (case.n, case.k), dtype=torch.int8, device=case.x.device)
    return lambda: torch._int_mm(x, weight.t())


def _operators(case: Case) -> tuple[TokenQuantize, PackedLinear]:
    quantizer, product = case.kernels.operators(case.x)
    if quantizer is None:
        raise ValueError(f"{case.scheme} quantizes no activations")
    return quantizer, product


def _first_tactic(launcher: Launcher, variant: PluginVariant, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return launch(launcher, variant, 0, inputs)
