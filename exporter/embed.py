"""`fp4export embed`: the prompts file, made once with the pipeline's own text encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from exporter.errors import InputError
from exporter.evaluation.prompts import read_prompts
from exporter.files import atomic_path, check_parent
from exporter.model_section import LABELLED_FAMILIES
from exporter.models.families import adapter_of
from exporter.models.loading import skeleton
from exporter.models.location import CONFIG, find_model, locate_pipeline, read_config
from exporter.models.prompts import load_prompts
from exporter.models.text_encoders import TextEncoder, encode, read_pipeline
from exporter.progress import NullProgress, Progress
from exporter.recipe import load_recipe

_METADATA = "fp4export.embed"


@dataclass(frozen=True)
class EmbedOptions:
    """How captions are encoded; `tokens` per caption replaces the pipeline's own number, None keeps it."""

    negative: str = ""
    dtype: str = "auto"
    tokens: int | None = None
    batch_size: int = 4


def embed(
    model: str, prompts: Path, output: Path, options: EmbedOptions | None = None, progress: Progress | None = None
) -> Path:
    """Encode the captions in `prompts` with the text encoders of `model` and write them to `output`.

    `model` is a recipe, a pipeline's directory, or a Hub id. One encoder is in memory at a time, the transformer never;
    what is written is what the pipeline's `encode_prompt` returns, under the names that it returns it by. Raises
    `InputError`, or `EnvironmentLacksError` without transformers or the Hub.
    """
    options, progress = options or EmbedOptions(), progress or NullProgress()
    if output.suffix != ".safetensors":
        raise InputError(f"{output}: expected NAME.safetensors")
    check_parent(output)
    texts = read_texts(prompts)
    pipeline = _pipeline(model)
    transformer = find_model(pipeline).transformer
    config = read_config(transformer)
    adapter = adapter_of(config, transformer / CONFIG)
    conditions = adapter.conditions(skeleton(config, adapter, transformer / CONFIG))
    if all(condition.kind == "label" for condition in conditions):
        raise InputError(_no_embeddings(model, adapter.family))
    tensors: dict[str, Tensor] = {}
    lengths = {condition.key: condition.shape[0] for condition in conditions}
    for part in adapter.text_encoders(str(read_pipeline(pipeline).get("_class_name"))):
        fixed = lengths[part.embeds]
        sized = replace(part, tokens=fixed or options.tokens or part.tokens)
        tensors.update(_encoded(pipeline, sized, texts, options, progress))
    facts = {"prompts": texts, "negative": options.negative}
    with atomic_path(output) as temporary:
        save_file(tensors, temporary, metadata={_METADATA: json.dumps(facts, sort_keys=True)})
        load_prompts(temporary, conditions)
    progress.note(f"wrote {output}: {len(texts)} prompts")
    return output


def _encoded(
    pipeline: Path, part: TextEncoder, texts: Sequence[str], options: EmbedOptions, progress: Progress
) -> dict[str, Tensor]:
    """Embeddings and mask of all texts, and of the negative prompt, by their keys."""
    rows = encode(pipeline, part, [*texts, options.negative], options.dtype, options.batch_size, progress)
    positive = {key: tensor[:-1].contiguous() for key, tensor in rows.items()}
    return {**positive, **{f"negative_{key}": tensor[-1:].contiguous() for key, tensor in rows.items()}}


def read_texts(file: Path) -> list[str]:
    """The captions of a prompt list (see `read_prompts`), in its order. Raises `InputError`."""
    texts = [prompt.text for prompt in read_prompts(file)]
    if None in texts:
        raise InputError(f"{file}: holds embeddings already; --prompts takes captions (.txt, .json or .yaml)")
    return [str(text) for text in texts]


def _no_embeddings(model: str, family: str) -> str:
    return f"{model}: family {family} draws class labels and needs no embeddings; a recipe lists calibration.classes"


def _pipeline(model: str) -> Path:
    """The folder of the pipeline that `model` names. Raises `InputError` for a recipe whose family takes no captions,
    before the Hub is asked for anything."""
    if Path(model).is_dir():
        return locate_pipeline(model, Path.cwd())
    if Path(model).suffix in (".yaml", ".yml") or "/" not in model:
        recipe = load_recipe(model)
        family = recipe.model.family
        if family in LABELLED_FAMILIES:
            raise InputError(_no_embeddings(model, family))
        return locate_pipeline(recipe.model.weights, recipe.source_dir, recipe.model.revision)
    return locate_pipeline(model, Path.cwd())
