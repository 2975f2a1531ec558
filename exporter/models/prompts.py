"""Prompt embeddings: computed once by the text encoder, stored in safetensors, all that calibration needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.models.weight_files import read_tensors

_EMBEDS = "prompt_embeds"
_MASK = "prompt_attention_mask"
_NEGATIVE_EMBEDS = "negative_prompt_embeds"
_NEGATIVE_MASK = "negative_prompt_attention_mask"
_LABELS = "labels"
_REQUIRED = (_EMBEDS, _MASK, _NEGATIVE_EMBEDS, _NEGATIVE_MASK)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Prompts:
    """Embeddings of P prompts of S tokens, float32, with masks of 1 (a token) and 0 (padding).

    prompt_embeds [P, S, D], prompt_attention_mask [P, S]; the negative ones are the same for all prompts,
    [1, S, D] and [1, S], or one each, [P, S, D] and [P, S]; labels int64 [P] are what a classifier should see.
    """

    prompt_embeds: Tensor
    prompt_attention_mask: Tensor
    negative_prompt_embeds: Tensor
    negative_prompt_attention_mask: Tensor
    labels: Tensor | None = None

    @property
    def count(self) -> int:
        """How many prompts."""
        return int(self.prompt_embeds.shape[0])

    @property
    def tokens(self) -> int:
        """Length S of every prompt, padding included."""
        return int(self.prompt_embeds.shape[1])

    def conditional(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and masks of the prompts at `indices` int64 [B]."""
        return self.prompt_embeds[indices], self.prompt_attention_mask[indices]

    def unconditional(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Negative embeddings and masks that go with the prompts at `indices` int64 [B]."""
        rows = indices if self.negative_prompt_embeds.shape[0] > 1 else torch.zeros_like(indices)
        return self.negative_prompt_embeds[rows], self.negative_prompt_attention_mask[rows]


def load_prompts(path: Path, caption_dim: int) -> Prompts:
    """Read and check a prompt file; `caption_dim` is the width D that the model takes. Raises `InputError`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; calibration.prompts is a safetensors file with {', '.join(_REQUIRED)}")
    tensors = dict(read_tensors(path))
    for name in _REQUIRED:
        if name not in tensors:
            raise InputError(f"{path}: {name} is missing; the file holds {', '.join(tensors) or 'nothing'}")
    count = _check_embeds(path, tensors, caption_dim)
    masks = {name: _mask(path, name, tensors) for name in (_MASK, _NEGATIVE_MASK)}
    return Prompts(
        prompt_embeds=tensors[_EMBEDS].to(torch.float32),
        prompt_attention_mask=masks[_MASK],
        negative_prompt_embeds=tensors[_NEGATIVE_EMBEDS].to(torch.float32),
        negative_prompt_attention_mask=masks[_NEGATIVE_MASK],
        labels=_labels(path, tensors, count),
    )


def _check_embeds(path: Path, tensors: Mapping[str, Tensor], caption_dim: int) -> int:
    """Check both embeddings' types, shapes and values; returns the number of prompts."""
    for name in (_EMBEDS, _NEGATIVE_EMBEDS):
        tensor = tensors[name]
        if tensor.ndim != 3 or tensor.numel() == 0 or tensor.dtype not in _FLOATS:
            raise InputError(
                f"{path}: {name} is {_described(tensor)}; expected floats [prompts, tokens, {caption_dim}]"
            )
        if tensor.shape[2] != caption_dim:
            raise InputError(
                f"{path}: {name} is {tensor.shape[2]} wide, but the model takes captions {caption_dim} wide"
            )
        if not bool(torch.isfinite(tensor.to(torch.float32)).all()):
            raise InputError(f"{path}: {name} holds {_not_finite(tensor)}")
    (count, tokens, _), negative = tensors[_EMBEDS].shape, tensors[_NEGATIVE_EMBEDS].shape
    if negative[0] not in (1, count) or negative[1] != tokens:
        raise InputError(
            f"{path}: {_NEGATIVE_EMBEDS} is {list(negative)}; with {_EMBEDS} {list(tensors[_EMBEDS].shape)} it must be "
            f"[1 or {count}, {tokens}, {caption_dim}]"
        )
    return count


def _mask(path: Path, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The mask as float32 ones and zeros, at least one token in every row."""
    mask, embeds = tensors[name], tensors[name.replace("attention_mask", "embeds")]
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
