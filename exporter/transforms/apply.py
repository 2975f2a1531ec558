"""Transforms of a whole model: branches found once and kept in a file, applied to copies of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporter.plan import LayerPlan
from exporter.progress import Progress
from exporter.quantize import share_copy
from exporter.transforms.linear import SHIFTS, TransformedLinear
from exporter.transforms.low_rank import LowRank, factorize


def find_low_rank(model: nn.Module, ranks: Mapping[str, int], progress: Progress) -> dict[str, LowRank]:
    """Factorize the weights of the linear layers in `ranks`."""
    found: dict[str, LowRank] = {}
    with progress.task("branches of low rank", len(ranks)) as task:
        for name, rank in ranks.items():
            found[name] = factorize(_linear(model, name).weight.detach(), rank)
            task.advance()
    return found


def with_transforms(model: nn.Module, layers: Sequence[LayerPlan], low_rank: Mapping[str, LowRank]) -> nn.Module:
    """A copy of `model` that computes the same, up to rounding, with the planned linear layers inside of
    `TransformedLinear`s; `low_rank` has branches by the original layers' names. What has not changed is shared."""
    changed = share_copy(model)
    for layer in layers:
        if layer.is_transformed:
            name = layer.original_name
            module = TransformedLinear(_linear(model, name), layer.hadamard, low_rank.get(name), SHIFTS[layer.shift])
            changed.set_submodule(name, module)
    return changed.eval()


def save_low_rank(path: Path, branches: Mapping[str, LowRank]) -> None:
    """Write the branches as safetensors in FP16, which holds them exactly."""
    tensors: dict[str, Tensor] = {}
    for name, branch in branches.items():
        tensors |= {f"{name}.up": branch.up.half(), f"{name}.down": branch.down.half()}
    save_file(tensors, path)


def load_low_rank(path: Path, names: Mapping[str, int]) -> dict[str, LowRank]:
    """Read back what was saved for the same layers."""
    tensors = load_file(path)
    return {name: LowRank(tensors[f"{name}.up"].float(), tensors[f"{name}.down"].float()) for name in names}


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name}: {type(module).__name__} is no linear layer")
    return module
