"""torch.export and torch.onnx.export as this project calls them, and the marks at the blocks' boundaries."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from exporter.models.inputs import shared_inputs
from exporter.symbolic import symbolic_boundary

# Opset 23 turns scaled dot-product attention into `Attention`, whose broadcast mask ONNX Runtime rejects.
OPSET = 21
LARGEST_BATCH = 4096


def batch_axis() -> torch.export.Dim:
    """The one size that stays open."""
    return torch.export.Dim("batch", min=1, max=LARGEST_BATCH)


def trace(
    module: nn.Module, arguments: Sequence[Tensor], shapes: tuple[Any, ...], input_names: Sequence[str], output: str
) -> ir.Model:
    """The ONNX graph of `module` called with `arguments`; `shapes` are torch.export's dynamic shapes.

    Inputs and the one output get the given names. Weights stay where they are until the model is serialized.
    """
    with torch.no_grad(), _quiet(), _RepeatedByView():
        program = torch.export.export(module, tuple(arguments), dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(input_names),
            output_names=[output],
            verbose=False,
        )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return exported.model


class _RepeatedByView(TorchFunctionMode):
    """x.repeat_interleave(n, dim) → x's axis and one of n behind it, flattened into one: the same numbers.

    PyTorch before 2.13 would fix the batch at its size in the example, where masks are repeated for attention's heads.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.repeat_interleave:
            return _repeated(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _repeated(x: Tensor, repeats: int | Tensor, dim: int | None = None, **others: Any) -> Tensor:
    if not isinstance(repeats, int) or dim is None:
        return x.repeat_interleave(repeats, dim, **others)
    dim %= x.ndim
    copies = x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :])
    return copies.flatten(dim, dim + 1)


@contextmanager
def marked_boundaries(
    blocks: Sequence[tuple[str, nn.Module]], skips: Mapping[str, Mapping[str, str]]
) -> Iterator[None]:
    """Mark every block's float inputs and its output while the model is being traced.

    What a block takes from an earlier one by a skip is that one's output, marked already.
    """
    handles = []
    for name, block in blocks:

        def mark_inputs(
            _module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            name: str = name,
            taken: Collection[str] = tuple(skips.get(name, ())),
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden, *rest = args
            shared = {
                key: symbolic_boundary(value, f"blocks.{key}") if key in shared_inputs(kwargs, taken) else value
                for key, value in kwargs.items()
            }
            return (symbolic_boundary(hidden, f"{name}.input"), *rest), shared

        def mark_output(_module: nn.Module, _args: tuple[Any, ...], output: Tensor, name: str = name) -> Tensor:
            return symbolic_boundary(output, f"{name}.output")

        handles.append(block.register_forward_pre_hook(mark_inputs, with_kwargs=True))
        handles.append(block.register_forward_hook(mark_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on optional packages, and its optimizer's; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
