"""FP4DiT's calibration written down as published, in straightforward PyTorch: what `tools.calibration_speed` races.

Formulas and settings are the paper's (arXiv 2503.15465) and its released code's, but for the batch, which is given:
weights in groups of 128 consecutive numbers, scales by absmax, an absolute learning rate, everything but the steps
computed anew in every iteration, and the whole network run again for every block's inputs. Only the inputs are ours:
those of real sampler trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.calibration.block_inputs import BlockInputs
from exporter.calibration.inputs import CalibrationRun
from exporter.quantize import share_copy

GROUP = 128
LEARNING_RATE = 1e-3
PENALTY = 0.01
WARMUP = 0.2
BETA_START, BETA_END = 20.0, 2.0
ZETA, GAMMA = 1.1, -0.1
_SMALLEST_MAXVAL = 1e-4
_FIRST_FEED_FORWARD = "ff.net.0.proj"

SETTINGS = (GROUP, LEARNING_RATE, PENALTY, WARMUP, BETA_START, BETA_END, ZETA, GAMMA)
"""What the loop learns with, beside formats, iterations, batches and the seed. Who changes the loop itself deletes its
cells."""


class PublishedLinear(nn.Module):
    """A linear layer whose 4-bit weights, with `mantissa` bits, are learned by scale-aware AdaRound."""

    def __init__(self, linear: nn.Linear, mantissa: int) -> None:
        super().__init__()
        self.bias = linear.bias
        self.weight = linear.weight.detach().reshape(-1, GROUP)
        self.shape = linear.weight.shape
        self.maxval = self.weight.abs().amax(dim=1, keepdim=True).clamp(min=_SMALLEST_MAXVAL)
        exponent = 3 - mantissa
        bias = 2.0**exponent - self.maxval.log2() + math.log2(2 - 2.0**-mantissa) - 1
        binade = torch.floor(self.weight.abs().log2() + bias).clamp(min=1)
        self.step = 2.0 ** (binade - mantissa - bias)
        rest = self.weight / self.step - torch.floor(self.weight / self.step)
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1) * self.step)
        self.soft = False

    def h(self) -> Tensor:
        """How far each weight goes up, 0 to 1."""
        return (torch.sigmoid(self.alpha / self.step) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def quantized(self) -> Tensor:
        """The weight [N, K], soft while it is learned."""
        up = self.h() if self.soft else (self.alpha >= 0).float()
        clipped = self.weight.clamp(-self.maxval, self.maxval)
        rounded = (torch.floor(clipped / self.step) + up) * self.step
        return rounded.clamp(-self.maxval, self.maxval).reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N]."""
        return F.linear(x, self.quantized(), self.bias)


def calibrate_as_published(
    model: nn.Module, run: CalibrationRun, iterations: int, batch: int, seed: int, done: Callable[[], None]
) -> nn.Module:
    """Learn all linear layers of the blocks, block by block; returns the model with rounded weights.

    The paper's batches are 16 samples for PixArt, 4 for Hunyuan-DiT.
    """
    generator = torch.Generator().manual_seed(seed)
    quantized = share_copy(model)
    for name, block in run.adapter.blocks(model):
        targets = run.block_inputs(model, block).outputs(block, run.store, run.limit)
        unit = quantized.get_submodule(name)
        layers = [path for path, module in unit.named_modules() if isinstance(module, nn.Linear)]
        inputs = run.block_inputs(quantized, unit)
        for path in layers:
            linear = unit.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            unit.set_submodule(path, PublishedLinear(linear, 0 if path == _FIRST_FEED_FORWARD else 1))
        _learn(unit, inputs, targets, iterations, batch, generator, done)
    return quantized


def _learn(
    unit: nn.Module,
    inputs: BlockInputs,
    targets: Tensor,
    iterations: int,
    batch: int,
    generator: torch.Generator,
    done: Callable[[], None],
) -> None:
    layers = [module for module in unit.modules() if isinstance(module, PublishedLinear)]
    for layer in layers:
        layer.soft = True
    optimizer = torch.optim.Adam([layer.alpha for layer in layers], lr=LEARNING_RATE)
    for iteration in range(iterations):
        chosen = torch.randint(len(inputs), (batch,), generator=generator)
        output = inputs.run(unit, chosen)
        loss = (output - targets[chosen]).square().sum(dim=1).mean()
        begin = WARMUP * iterations
        if iteration >= begin:
            beta = BETA_START + (BETA_END - BETA_START) * (iteration - begin) / (iterations - begin)
            for layer in layers:
                loss = loss + PENALTY * (1 - (2 * layer.h() - 1).abs().pow(beta)).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        done()
    for layer in layers:
        layer.soft = False
