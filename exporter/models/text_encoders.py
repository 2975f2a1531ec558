"""A pipeline's own text encoders: tokenizers and encoder models in transformers' layout, one at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.errors import EnvironmentLacksError, InputError, did_you_mean
from exporter.models.weight_files import only_variant, pickle_note
from exporter.progress import Progress

MODEL_INDEX = "model_index.json"
# The classes of the families' pipelines; a name from a file never reaches anything else.
_TOKENIZERS = (
    "T5Tokenizer",
    "T5TokenizerFast",
    "MT5Tokenizer",
    "MT5TokenizerFast",
    "BertTokenizer",
    "BertTokenizerFast",
    "CLIPTokenizer",
    "CLIPTokenizerFast",
)
_ENCODERS = ("T5EncoderModel", "MT5EncoderModel", "BertModel", "CLIPTextModel")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TextEncoder:
    """How a pipeline makes one tensor of embeddings and its mask.

    `embeds` and `mask` are keys of the prompts file; `tokenizer` and `encoder` are folders of the pipeline;
    `tokens` is how many a caption gets, padding included; `lower_case`: captions are stripped and lowered first.
    """

    embeds: str
    mask: str
    tokenizer: str
    encoder: str
    tokens: int
    lower_case: bool


def read_pipeline(pipeline: Path) -> dict[str, Any]:
    """The content of the pipeline's model_index.json. Raises `InputError`."""
    file = pipeline / MODEL_INDEX
    if not file.is_file():
        raise InputError(f"{pipeline}: has no {MODEL_INDEX}; text encoders belong to a pipeline, so give its folder")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{file}: expected a JSON object")
    return data


@torch.no_grad()
def encode(
    pipeline: Path, part: TextEncoder, texts: Sequence[str], dtype: str, batch_size: int, progress: Progress
) -> dict[str, Tensor]:
    """Embeddings [len(texts), tokens, width] and mask int64 [len(texts), tokens] by their keys.

    The encoder is loaded for this call alone, in `dtype` ("auto": as it is stored). Raises `InputError`, or
    `EnvironmentLacksError` without transformers.
    """
    index = read_pipeline(pipeline)
    texts = [text.lower().strip() for text in texts] if part.lower_case else list(texts)
    tokenizer = load_text_part(pipeline, index, part.tokenizer)
    tokens = tokenizer(
        texts,
        padding="max_length",
        max_length=part.tokens,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    ids, mask = tokens.input_ids, tokens.attention_mask
    longest = int(tokenizer(texts, padding="longest", return_tensors="pt").input_ids.shape[1])
    if longest > part.tokens:
        progress.note(
            f"warning: {part.tokenizer}: the longest prompt has {longest} tokens; all behind {part.tokens} are cut"
        )
    encoder = load_text_part(pipeline, index, part.encoder, dtype).eval()
    rows = []
    with progress.task(part.encoder, len(texts)) as task:
        for start in range(0, len(texts), batch_size):
            batch = slice(start, start + batch_size)
            rows.append(encoder(ids[batch], attention_mask=mask[batch])[0])
            task.advance(len(rows[-1]))
    return {part.embeds: torch.cat(rows), part.mask: mask}


def load_text_part(pipeline: Path, index: dict[str, Any], folder: str, dtype: str = "auto") -> Any:
    """The tokenizer or text encoder in `folder`, by the class that model_index.json names, encoders in `dtype` ("auto":
    as it is stored).

    Raises `InputError` for any class but those of the families' pipelines and for a pickle, `EnvironmentLacksError`
    without transformers.
    """
    is_tokenizer = folder.startswith("tokenizer")
    known = _TOKENIZERS if is_tokenizer else _ENCODERS
    library, name = _class_of(pipeline, index, folder)
    if library != "transformers" or name not in known:
        raise InputError(
            f"{pipeline / MODEL_INDEX}: {folder} is {library}.{name}; expected transformers' {', '.join(known)}"
            + did_you_mean(str(name), known)
        )
    if not (pipeline / folder).is_dir():
        raise InputError(f"{pipeline}: has no folder {folder}, which {MODEL_INDEX} names; download the whole pipeline")
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentLacksError(f"transformers is missing: {error}; pip install 'fp4export[embed]'") from error
    options: dict[str, Any] = {}
    if not is_tokenizer:
        options = {"use_safetensors": True, "dtype": dtype, "variant": only_variant(pipeline / folder, "model")}
    # It draws on any stream, terminal or not.
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    try:
        return getattr(transformers, name).from_pretrained(
            pipeline / folder, local_files_only=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{pipeline / folder}: not a {name} that can be loaded: {reason}{pickle_note(pipeline / folder)}"
        ) from error
    except ImportError as error:
        raise EnvironmentLacksError(f"{folder}: {error}; pip install 'fp4export[embed]'") from error


def _class_of(pipeline: Path, index: dict[str, Any], folder: str) -> tuple[str, str]:
    entry = index.get(folder)
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        raise InputError(f"{pipeline / MODEL_INDEX}: names no {folder}; this pipeline was saved without it")
    return entry[0], entry[1]
