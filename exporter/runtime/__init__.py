"""Running what was exported: graphs in ONNX Runtime, and whole outputs in a diffusers pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporter.runtime.onnx_session import OnnxSession
from exporter.runtime.signature import TensorSpec

if TYPE_CHECKING:
    from exporter.runtime.transformer import EngineTransformer

__all__ = ["EngineTransformer", "OnnxSession", "TensorSpec"]


def __getattr__(name: str) -> Any:
    """Import `EngineTransformer` on first use: running a graph on numpy arrays needs no torch."""
    if name != "EngineTransformer":
        raise AttributeError(f"module 'exporter.runtime' has no attribute {name!r}")
    from exporter.runtime.transformer import EngineTransformer

    return EngineTransformer
