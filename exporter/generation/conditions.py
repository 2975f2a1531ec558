"""What is to be drawn: prompt embeddings (or class labels) from a safetensors file, or texts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.models.weight_files import read_tensors

CLASS_LABELS = "class_labels"
_PROMPT_EMBEDS = "prompt_embeds"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Conditions(Protocol):
    """What a pipeline draws, one entry a prompt."""

    @property
    def count(self) -> int:
        """How many prompts."""

    def arguments(self, pipeline: Any, rows: Sequence[int], *, guided: bool) -> dict[str, Any]:
        """The pipeline's arguments for the prompts at `rows`; `guided`: it also takes what to guide away from."""


@dataclass(frozen=True)
class Embedded:
    """Tensors under the names that the pipeline's call gives them, [P, …]; negative ones [1 or P, …]."""

    source: Path
    tensors: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """How many prompts."""
        return len(self.tensors[CLASS_LABELS if CLASS_LABELS in self.tensors else _PROMPT_EMBEDS])

    @property
    def labels(self) -> list[int]:
        """The labels, none where embeddings are drawn from."""
        return self.tensors[CLASS_LABELS].tolist() if CLASS_LABELS in self.tensors else []

    def arguments(self, pipeline: Any, rows: Sequence[int], *, guided: bool) -> dict[str, Any]:
        """The tensors that the pipeline takes, of these rows.

        Raises `InputError` when it takes none of them, and when guidance lacks its negative embeddings.
        """
        accepted = inspect.signature(type(pipeline).__call__).parameters
        index = torch.tensor(list(rows))
        given = {
            name: tensor[index] if len(tensor) == self.count else tensor[torch.zeros_like(index)]
            for name, tensor in self.tensors.items()
            if name in accepted
        }
        if not given:
            raise InputError(f"{self.source}: holds nothing that {type(pipeline).__name__} draws from")
        for name in [f"negative_{name}" for name in given if name.startswith(_PROMPT_EMBEDS)]:
            if guided and name not in given:
                raise InputError(
                    f"{self.source}: {name} is missing, and guidance leads away from it; make the file with fp4export "
                    "embed, or draw without guidance: --guidance 1"
                )
        if CLASS_LABELS in given:
            return {CLASS_LABELS: [int(label) for label in given[CLASS_LABELS]]}
        # The pipelines make the negative embeddings of an empty text otherwise, which needs the text encoder.
        texts = {name: None for name in ("prompt", "negative_prompt") if name in accepted}
        return {**texts, **{name: _as_float(tensor) for name, tensor in given.items()}}


def _as_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class Texts:
    """Prompts for the pipeline's own text encoders; `tokens` is the length that the engine takes, None for any."""

    prompts: tuple[str, ...]
    negative: str = ""
    tokens: int | None = None

    @property
    def count(self) -> int:
        """How many prompts."""
        return len(self.prompts)

    def arguments(self, pipeline: Any, rows: Sequence[int], *, guided: bool) -> dict[str, Any]:
        """The texts of these rows, always with the negative one, which the pipeline leaves out if not `guided`."""
        texts = [self.prompts[row] for row in rows]
        arguments: dict[str, Any] = {"prompt": texts, "negative_prompt": [self.negative] * len(texts)}
        if self.tokens is not None and "max_sequence_length" in inspect.signature(type(pipeline).__call__).parameters:
            arguments["max_sequence_length"] = self.tokens
        return arguments


def class_labels(labels: Sequence[int]) -> Embedded:
    """Class labels to draw."""
    return Embedded(Path(CLASS_LABELS), {CLASS_LABELS: torch.tensor(list(labels))})


def read_conditions(path: Path) -> Embedded:
    """The embeddings in a safetensors file as `fp4export embed` or the pipeline's `encode_prompt` give them.

    Raises `InputError` for a file that is missing or holds no prompts, or whose tensors do not belong together or are
    not finite.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a safetensors file with {_PROMPT_EMBEDS} [prompts, …]")
    tensors = dict(read_tensors(path))
    first = CLASS_LABELS if CLASS_LABELS in tensors else _PROMPT_EMBEDS
    if first not in tensors or tensors[first].ndim == 0 or len(tensors[first]) == 0:
        raise InputError(
            f"{path}: holds neither {_PROMPT_EMBEDS} nor {CLASS_LABELS}; found {', '.join(tensors) or '-'}"
        )
    count = len(tensors[first])
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or len(tensor) not in ((1, count) if name.startswith("negative_") else (count,)):
            raise InputError(f"{path}: {name} is {list(tensor.shape)}, but {first} has {count} rows")
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{path}: {name} holds NaN or infinite numbers; make the file again with fp4export embed")
    labels = tensors.get(CLASS_LABELS)
    if labels is not None and (labels.ndim != 1 or labels.dtype not in _INTEGERS):
        dtype = str(labels.dtype).removeprefix("torch.")
        raise InputError(f"{path}: {CLASS_LABELS} is {dtype} {list(labels.shape)}; expected integers [{count}]")
    return Embedded(path, tensors)
