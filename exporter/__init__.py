"""fp4export: diffusion transformers from PyTorch to low-bit floating-point engines.

from exporter import export, load_recipe

result = export(load_recipe("digits"), "digits.onnx")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.pipeline import ExportResult, export
    from exporter.recipe import Recipe, load_recipe

__all__ = ["ExportResult", "Recipe", "export", "load_recipe"]
__version__ = "0.1.0"

_HOME = {"ExportResult": "pipeline", "export": "pipeline", "Recipe": "recipe", "load_recipe": "recipe"}


def __getattr__(name: str) -> Any:
    """Import on first use: `import exporter` itself loads no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'exporter' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"exporter.{_HOME[name]}"), name)
