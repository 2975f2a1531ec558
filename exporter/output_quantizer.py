"""Outputs of layers rounded to a format: what attention reads, where its products should see numbers of few bits."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from exporter.layer_section import HIGH_PRECISION
from exporter.plan import LayerPlan
from exporter.rounding import InputQuantizer, quantize_online
from exporter.symbolic import is_traced, symbolic_fake_quantize
from exporter.transforms.linear import TransformedLinear
from plugins.formats import get_format


class OutputQuantizer(nn.Module):
    """Rounds a layer's output [..., N] to the planned format and back, with scales of each token's own.

    `group_size` neighbours share a scale, 0 means the whole token. `layer` is the module path in the model as it was
    loaded. While torch.export traces it, it becomes one node of the waist.
    """

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        self.layer = plan.original_name
        self.format = plan.output_format
        self.group_size = plan.output_group

    def quantize(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(values [..., N] on the unit grid, scales [..., 1] or [..., N/G]) of y [..., N]."""
        values, scales = quantize_online(self._grouped(y), get_format(self.format))
        return values.flatten(-2), scales.squeeze(-1)

    def forward(self, y: Tensor) -> Tensor:
        """y [..., N] → [..., N]; the gradient passes straight through."""
        if is_traced():
            return symbolic_fake_quantize(y, self.layer, self.format, self.group_size)
        # On a GPU the layer's kernels may give float16 or bfloat16; rounding looks at the bits of a float32.
        rounded = InputQuantizer(get_format(self.format)).fake_quantize(self._grouped(y.float()))
        return rounded.flatten(-2).to(y.dtype)

    def _grouped(self, y: Tensor) -> Tensor:
        return y.reshape(*y.shape[:-1], -1, self.group_size or y.shape[-1])

    def extra_repr(self) -> str:
        """Name the format in the module's printout."""
        return f"{self.format}, group={self.group_size}"


def quantize_outputs(model: nn.Module, layers: Iterable[LayerPlan], root: str = "") -> None:
    """Let those planned layers round their outputs, in place, that are to; `root` is the path of `model`."""
    for layer in layers:
        if layer.output_format == HIGH_PRECISION:
            continue
        module = model.get_submodule(layer.original_name.removeprefix(f"{root}." if root else ""))
        if not isinstance(module, TransformedLinear):
            raise TypeError(f"{layer.original_name}: {type(module).__name__} has no place for a quantizer behind it")
        module.quantizer = OutputQuantizer(layer)
