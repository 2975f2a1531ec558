"""The token quantizer: its name and its function body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx

from plugins.body import Body
from plugins.domain import BODY_OPSET
from plugins.token_quantize import function_body
from plugins.token_quantize.variant import QuantizerVariant


@dataclass(frozen=True)
class TokenQuantize(QuantizerVariant):
    """TokenQuantize_<format>_<container>_<float>_k<K>: x [..., K] → numbers [..., K], scales f32 [..., 1]."""

    NAME: ClassVar[str] = "TokenQuantize"
    SOURCE: ClassVar[str] = "plugins.token_quantize.kernel:token_quantize"

    def function(self, opset: int = BODY_OPSET) -> onnx.FunctionProto:
        """The operator in standard operators."""
        body = Body()
        function_body.append_quantization(body, function_body.append_float32(body, "x"), self)
        return function_body.function_of(self, body, opset, "Quantizes every token.")
