"""The quantizer behind a modulated layer normalization: its name, inputs and function body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx

from plugins.body import Body
from plugins.domain import BODY_OPSET
from plugins.kernels.spec import Constant, Scalar
from plugins.norm_quantize.function_body import append_modulated_norm
from plugins.norm_quantize.reference import EPSILON
from plugins.token_quantize.function_body import append_float32, append_quantization, function_of
from plugins.token_quantize.variant import FLOATS, QuantizerVariant


@dataclass(frozen=True)
class NormQuantize(QuantizerVariant):
    """NormQuantize_<format>_<container>_<float>_k<K>[_shared]: LayerNorm(x) · scale + shift → numbers, scales.

    x [B, T, K]; scale and shift [B, 1, K], or [1, 1, K] with `_shared`, as an affine norm has them; of `float_type`.
    scale is the whole factor: where the model has 1 + modulation, the 1 is in it. Outputs: numbers [B, T, K], scales
    f32 [B, T, 1].
    """

    shared: bool = False

    NAME: ClassVar[str] = "NormQuantize"
    SOURCE: ClassVar[str] = "plugins.norm_quantize.kernel:norm_quantize"

    @property
    def op_type(self) -> str:
        """Node type."""
        return f"{super().op_type}{'_shared' * self.shared}"

    @property
    def input_types(self) -> Mapping[str, int]:
        """ONNX element types by input name, in order."""
        return dict.fromkeys(("x", "scale", "shift"), FLOATS[self.float_type])

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """The kernel's integers."""
        return ("rows",) if self.shared else ("rows", "rows_per_sample")

    @property
    def constants(self) -> Mapping[str, Constant]:
        """Constants that this operator's kernel has beside the quantizer's."""
        unused: dict[str, Constant] = {"rows_per_sample": 1} if self.shared else {}
        return {"SHARED": self.shared, "EPSILON": EPSILON, **unused}

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""
        body = Body()
        floats = [append_float32(body, name) for name in self.input_names]
        append_quantization(body, append_modulated_norm(body, *floats), self)
        return function_of(self, body, opset, "Normalizes and modulates every token, and quantizes the result.")
