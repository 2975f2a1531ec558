"""Linear layers of a network that is being quantized: while their rounding is learned, and when it is decided."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.calibration.adaround import LearnedRounding, Penalty
from exporter.method_section import MethodSection
from exporter.plan import LayerPlan
from exporter.quantize import QuantizedWeight, input_quantizer
from plugins.formats import get_format


class _PlannedLinear(nn.Module):
    """A linear layer of the plan whose inputs, with `activations`, are rounded as the plan says."""

    bias: Tensor | None

    def __init__(self, plan: LayerPlan, linear: nn.Linear, quantized: QuantizedWeight, activations: bool) -> None:
        super().__init__()
        self.format = get_format(plan.weight_format)
        self._input = input_quantizer(plan, quantized.input_scale) if activations else None
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def quantized_input(self, x: Tensor) -> Tensor:
        """x [..., K] as the layer rounds its inputs."""
        # Rounding looks at the bits of a float32, and what learns in BF16 gives BF16.
        return x if self._input is None else self._input.fake_quantize(x.float())

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer makes of inputs x [..., K] with a weight [N, K]."""
        return F.linear(x, weight, self.bias)


class DecidedLinear(_PlannedLinear):
    """A linear layer with a quantized weight that is kept as codes and scales, and decoded anew in every call.

    It computes, bit for bit, what a `RoundingLinear` with this weight does.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, plan: LayerPlan, linear: nn.Linear, quantized: QuantizedWeight, activations: bool) -> None:
        super().__init__(plan, linear, quantized, activations)
        self._dtype = linear.weight.dtype
        self.register_buffer("codes", quantized.codes, persistent=False)
        self.register_buffer("scales", quantized.scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N]."""
        weight = QuantizedWeight(self.codes, self.scales).dequantize(self.format).to(self._dtype)
        return self.linear(self.quantized_input(x), weight)


class RoundingLinear(_PlannedLinear):
    """A linear layer while its rounding is being decided: on its quantized weight, or on a soft one."""

    dequantized: Tensor

    def __init__(self, plan: LayerPlan, linear: nn.Linear, quantized: QuantizedWeight, activations: bool) -> None:
        super().__init__(plan, linear, quantized, activations)
        self.original = linear.weight.detach()
        self.quantized = quantized
        self.register_buffer("dequantized", quantized.dequantize(self.format).to(self.original), persistent=False)
        self.rounding: LearnedRounding | None = None
        self.penalty: Penalty | None = None

    def start(self, method: MethodSection) -> LearnedRounding:
        """Make the rounding soft, on the scales that the weight already has, and with its values if so asked."""
        # The original weight is needed on a GPU only to begin with.
        original = self.original.to(self.dequantized)
        values = None
        if method.start != "nearest":
            values = torch.tensor(self.format.values)[self.quantized.codes.int()].to(original)
        self.rounding = LearnedRounding(original, self.quantized.scales.to(original), self.format, values)
        return self.rounding

    def decide(self, keep: bool) -> QuantizedWeight:
        """End the soft phase with what was learned, or with the weight as it was; return the one replaced."""
        before, rounding = self.quantized, self.rounding
        self.rounding = None
        if keep and rounding is not None:
            values = rounding.hard_values()
            self.replace(QuantizedWeight.from_values(values, before.scales, self.format, before.input_scale))
        return before

    def replace(self, quantized: QuantizedWeight) -> None:
        """Compute with another quantized weight from now on."""
        self.quantized = quantized
        self.dequantized.copy_(quantized.dequantize(self.format))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N]."""
        weight = self.dequantized if self.rounding is None else self.rounding.soft_weight(self.penalty)
        return self.linear(self.quantized_input(x), weight)
