"""The quantizer behind tanh-GELU: its name and its function body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx

from plugins.body import Body
from plugins.domain import BODY_OPSET
from plugins.gelu_quantize.function_body import append_tanh_gelu
from plugins.token_quantize.function_body import append_float32, append_quantization, function_of
from plugins.token_quantize.variant import QuantizerVariant


@dataclass(frozen=True)
class GeluQuantize(QuantizerVariant):
    """GeluQuantize_<format>_<container>_<float>_k<K>: x [..., K] → numbers [..., K], scales f32 [..., 1] of GELU(x)."""

    NAME: ClassVar[str] = "GeluQuantize"
    SOURCE: ClassVar[str] = "plugins.gelu_quantize.kernel:gelu_quantize"

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""
        body = Body()
        append_quantization(body, append_tanh_gelu(body, append_float32(body, "x")), self)
        return function_of(self, body, opset, "Quantizes every token of tanh-GELU's result.")
