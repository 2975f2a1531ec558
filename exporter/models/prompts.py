"""What trajectories are conditioned on: prompt embeddings from a safetensors file, or class labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.models.inputs import Condition
from exporter.models.weight_files import read_tensors

_LABELS = "labels"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Prompts:
    """P prompts as the transformer takes them, by the names of its inputs.

    `positive` tensors are [P, ...]: embeddings float32, masks float32 of 1 (a token) and 0 (padding), class labels
    int64; the `negative` ones are the same for all prompts, [1, ...], or one each, [P, ...]; labels int64 [P] are what
    a classifier should see.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor]
    labels: Tensor | None = None

    @property
    def count(self) -> int:
        """How many prompts."""
        return len(next(iter(self.positive.values())))

    @property
    def negatives(self) -> int:
        """How many rows the negative tensors have: 1 or `count`."""
        return len(next(iter(self.negative.values())))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.positive.values())).device

    def to(self, device: torch.device) -> Prompts:
        """The same on a device; labels stay where they are."""
        positive, negative = (
            {name: tensor.to(device) for name, tensor in tensors.items()} for tensors in (self.positive, self.negative)
        )
        return Prompts(positive, negative, self.labels)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """Input name → rows at `indices` int64 [B]: of `positive`, and for an index below 0 row -1 - index of
        `negative`."""
        rows = indices.to(self.device)
        return {name: _gather(tensor, self.negative[name], rows) for name, tensor in self.positive.items()}


def _gather(positive: Tensor, negative: Tensor, rows: Tensor) -> Tensor:
    is_negative = (rows < 0).reshape(-1, *[1] * (positive.ndim - 1))
    return torch.where(is_negative, negative[(-1 - rows).clamp(min=0)], positive[rows.clamp(min=0)])


def class_prompts(condition: Condition, classes: Sequence[int], negative: int) -> Prompts:
    """Class labels as prompts, `negative` for none. The caller has checked that they are below `condition.classes`."""
    labels = torch.tensor(classes, dtype=torch.int64)
    return Prompts({condition.input: labels}, {condition.input: torch.tensor([negative])}, labels)


def spread_labels(classes: int, count: int) -> list[int]:
    """`count` of the class labels below `classes`, evenly spread."""
    return [index * classes // count for index in range(count)]


def load_prompts(path: Path, conditions: Sequence[Condition]) -> Prompts:
    """Read and check a prompt file, which must hold all `conditions`. Raises `InputError`."""
    wanted = [key for condition in conditions for key in (condition.key, condition.negative_key)]
    if not path.is_file():
        raise InputError(f"{path}: no such file; calibration.prompts is a safetensors file with {', '.join(wanted)}")
    tensors = dict(read_tensors(path))
    for name in wanted:
        if name not in tensors:
            raise InputError(f"{path}: {name} is missing; the file holds {', '.join(tensors) or 'nothing'}")
    loaded = {name: tensor for condition in conditions for name, tensor in _pair(path, tensors, condition)}
    counts = {len(loaded[condition.key]) for condition in conditions}
    if len(counts) > 1:
        sizes = ", ".join(f"{condition.key} {len(loaded[condition.key])}" for condition in conditions)
        raise InputError(f"{path}: different numbers of prompts: {sizes}")
    negatives = {len(loaded[condition.negative_key]) for condition in conditions}
    if len(negatives) > 1:
        sizes = ", ".join(f"{condition.negative_key} {len(loaded[condition.negative_key])}" for condition in conditions)
        raise InputError(f"{path}: different numbers of negative prompts: {sizes}")
    return Prompts(
        {condition.input: loaded[condition.key] for condition in conditions},
        {condition.input: loaded[condition.negative_key] for condition in conditions},
        _labels(path, tensors, counts.pop()),
    )


def _pair(path: Path, tensors: Mapping[str, Tensor], condition: Condition) -> list[tuple[str, Tensor]]:
    """The condition's tensor and its negative one, checked, each with its name."""
    pairs = []
    for name in (condition.key, condition.negative_key):
        if condition.kind == "mask":
            embeds = condition.of if name == condition.key else f"negative_{condition.of}"
            pairs.append((name, _mask(path, name, tensors[name], embeds, tensors[embeds])))
        else:
            pairs.append((name, _embeds(path, name, tensors[name], condition)))
    (_, positive), (_, negative) = pairs
    count = len(positive)
    if len(negative) not in (1, count) or negative.shape[1:] != positive.shape[1:]:
        shape = ", ".join([f"1 or {count}", *map(str, positive.shape[1:])])
        raise InputError(
            f"{path}: {condition.negative_key} is {list(negative.shape)}; with {condition.key} {list(positive.shape)} "
            f"it must be [{shape}]"
        )
    return pairs


def _embeds(path: Path, name: str, tensor: Tensor, condition: Condition) -> Tensor:
    """The embeddings in float32, if they have the condition's shape and all of them are finite."""
    shape = condition.shape
    if tensor.ndim != 1 + len(shape) or tensor.numel() == 0 or tensor.dtype not in _FLOATS:
        axes = ", ".join(["prompts", *("tokens" if size is None else str(size) for size in shape)])
        raise InputError(f"{path}: {name} is {_described(tensor)}; expected floats [{axes}]")
    if shape and shape[-1] is not None and tensor.shape[-1] != shape[-1]:
        raise InputError(
            f"{path}: {name} is {tensor.shape[-1]} wide, but the model takes captions {shape[-1]} wide as "
            f"{condition.input}"
        )
    for size, wanted in zip(tensor.shape[1:], shape, strict=True):
        if wanted not in (None, size):
            raise InputError(f"{path}: {name} is {list(tensor.shape)}, but the model takes {wanted} tokens, not {size}")
    values = tensor.to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{path}: {name} holds {_not_finite(tensor)}")
    return values


def _mask(path: Path, name: str, mask: Tensor, embeds_name: str, embeds: Tensor) -> Tensor:
    """The mask as float32 ones and zeros, at least one token in every row."""
    if mask.shape != embeds.shape[:2]:
        raise InputError(f"{path}: {name} is {_described(mask)}; its embeddings ask for {list(embeds.shape[:2])}")
    values = mask.to(torch.float32)
    odd = values[(values != 0) & (values != 1)]
    if odd.numel():
        raise InputError(f"{path}: {name} holds {odd[0].item():g}; a mask is 1 (a token) or 0 (padding)")
    empty = (values.sum(dim=1) == 0).nonzero()
    if empty.numel():
        raise InputError(f"{path}: {name} masks out every token of prompt {int(empty[0])}")
    return values


def _labels(path: Path, tensors: Mapping[str, Tensor], count: int) -> Tensor | None:
    labels = tensors.get(_LABELS)
    if labels is None:
        return None
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex():
        raise InputError(f"{path}: {_LABELS} is {_described(labels)}; expected integers [{count}]")
    values = labels.to(torch.int64)
    if bool((values < 0).any()):
        raise InputError(f"{path}: {_LABELS} holds {int(values.min())}; a label counts from 0")
    return values


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _not_finite(tensor: Tensor) -> str:
    return f"{int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} Inf"
