"""Record what every quantized linear of the torch model computes on rows of its own inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.compute import Compute
from exporter.cores import on_every_core
from exporter.gate.records import LinearRecord
from exporter.gate.rounding import rounded
from exporter.gate.segments import is_large
from exporter.quantize import QuantLinear
from exporter.rounding import dequantize

# Tokens of each linear that are compared, spread over the captured batches, and synthetic ones beside them.
TOKEN_ROWS = 224
PROBE_ROWS = 32
# A large model's linears get fewer rows, so that the saved numbers stay within a few hundred megabytes.
_MOST_NUMBERS = 64_000_000
_FEWEST_ROWS = 32
# Several times what float32 dot products lose, relative to the sum of the products' magnitudes.
_FLOAT32_LOSS = 2.0**-22


def as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """The tensor as a contiguous array."""
    return np.ascontiguousarray(tensor.numpy(force=True))


def chosen_rows(length: int, most: int) -> Tensor:
    """Which of `length` token rows are recorded, int64: at most so many, spread over all."""
    return torch.linspace(0, length - 1, min(most, length)).round().long()


@dataclass
class TokenRows:
    """Token rows of what `modules`, by layer, read, rounded to `compute`, gathered over several batches: at most
    `per_batch` of each. `ranks` are the axes of the tensors that they are of."""

    modules: Mapping[str, nn.Module]
    per_batch: int
    compute: Compute
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect while the model runs once."""
        with ExitStack() as hooks:
            for layer, module in self.modules.items():
                hooks.callback(module.register_forward_pre_hook(partial(self._keep, layer)).remove)
            yield

    def _keep(self, layer: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        flat = args[0].reshape(-1, args[0].shape[-1])
        chosen = chosen_rows(len(flat), self.per_batch)
        self.rows.setdefault(layer, []).append(rounded(flat[chosen].clone(), self.compute))
        self.ranks[layer] = args[0].ndim


@dataclass(frozen=True)
class LinearInputs:
    """Token rows of every quantized linear's input; `products` is what the lowered graph rounds the linears' products
    to."""

    modules: Mapping[str, QuantLinear]
    seen: TokenRows
    products: Compute = "fp32"

    @classmethod
    def of(cls, model: nn.Module, batches: int, compute: Compute = "fp32", products: Compute = "fp32") -> LinearInputs:
        """For `model`, which is going to run `batches` times."""
        modules = {module.layer: module for module in model.modules() if isinstance(module, QuantLinear)}
        per_row = sum(2 * module.in_features + module.out_features for module in modules.values())
        rows = min(TOKEN_ROWS, max(_FEWEST_ROWS, _MOST_NUMBERS // max(per_row, 1)))
        return cls(modules, TokenRows(modules, max(1, rows // batches), compute), products)

    @property
    def free_samples(self) -> int | None:
        """On how many samples of a batch graphs run free: on one where they are large, None for all.

        Every part of them is compared on all samples given its inputs; a second one running free would take a large
        model's gate a quarter longer.
        """
        return 1 if is_large(self.modules.values()) else None

    def collected(self) -> AbstractContextManager[None]:
        """Collect while the model runs once."""
        return self.seen.collected()

    def records(self) -> Iterator[LinearRecord]:
        """One record per linear that ran, in the order in which they first ran."""

        def recorded(layer: str) -> LinearRecord:
            rows = torch.cat(self.seen.rows[layer])
            record = linear_record(self.modules[layer], rows, self.seen.ranks[layer], self.seen.compute)
            return replace(record, products=self.products)

        return on_every_core(recorded, self.seen.rows)


def linear_record(module: QuantLinear, captured: Tensor, rank: int, compute: Compute = "fp32") -> LinearRecord:
    """What `module` makes of `captured` rows [R, K] and of synthetic ones; its input in the model has `rank` axes."""
    x = torch.cat([captured, rounded(_probes(captured), compute)])
    quantized = module.quantize_input(x)
    values, scales = (None, None) if quantized is None else (as_array(quantized[0]), as_array(quantized[1]))
    seen = x if quantized is None else dequantize(*quantized)
    weight = module.weight
    # What the module itself computes, with its weight decoded once; on a GPU it has kernels of its own.
    y = module(x) if x.is_cuda else F.linear(seen, weight, module.bias)
    bias = torch.zeros(y.shape[-1]) if module.bias is None else module.bias
    magnitudes = F.linear(seen.abs(), weight.abs_(), bias.abs()).square_()
    parts = (magnitudes[:-PROBE_ROWS], magnitudes[-PROBE_ROWS:])
    return LinearRecord(
        layer=module.layer,
        weight_format=module.weight_format,
        activation_format=module.activation_format,
        rank=rank,
        probes=PROBE_ROWS,
        x=as_array(x),
        values=values,
        scales=scales,
        y=as_array(y),
        bias=as_array(bias),
        noise_floor=as_array(torch.stack([part.mean(dim=0).sqrt() for part in parts]) * _FLOAT32_LOSS),
    )


def _probes(captured: Tensor) -> Tensor:
    """Rows in which every input channel speaks, so that a wrong weight shows even where real inputs are silent.

    Magnitudes lie within a factor of two below the captured rows' typical largest one; signs are random. The same
    captured rows give the same probes, so layers that share an input still do.
    """
    generator = torch.Generator().manual_seed(captured.shape[-1])
    shape = (PROBE_ROWS, captured.shape[-1])
    typical = captured.abs().amax(dim=-1).median().clamp_min(1e-3)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return signs * (0.5 + 0.5 * torch.rand(shape, generator=generator)) * typical
