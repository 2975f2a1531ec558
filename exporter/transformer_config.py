"""The transformer's config in an exported graph's metadata, so that the file alone can stand in for the transformer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from exporter.errors import InputError
from exporter.models.location import CONFIG, find_model, read_config
from exporter.onnx_files import read_model
from exporter.origin import Origin, origin_path

CONFIG_KEY = "fp4export.transformer"
CLASS_NAME = "_class_name"


def write_transformer_config(model: onnx.ModelProto, class_name: str, config: Mapping[str, Any]) -> None:
    """Put a diffusers config into the model's metadata, in place of what was there; private keys are left out."""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    kept = {entry.key: entry.value for entry in model.metadata_props}
    kept[CONFIG_KEY] = json.dumps({CLASS_NAME: class_name, **public}, sort_keys=True)
    onnx.helper.set_model_props(model, kept)


def config_of_output(output: Path, model: Path | None = None) -> dict[str, Any]:
    """The config of the transformer that was exported to `output`.

    From the directory `model` (a pipeline's or a transformer's) if one is given, else from the graph's metadata; an
    engine has none, so the graph that it was built from is asked. Raises `InputError` when nothing is found.
    """
    if model is not None:
        return read_config(find_model(model).transformer)
    graph = output
    if output.suffix != ".onnx" and origin_path(output).is_file():
        graph = Origin.read(output).graph
    text = _config_text(graph) if graph.suffix == ".onnx" and graph.is_file() else None
    if text is None:
        raise InputError(
            f"{output}: does not say which transformer it stands for; give the model's directory, the one with "
            f"{CONFIG}, with --model"
        )
    try:
        config = json.loads(text)
    except ValueError as error:
        raise InputError(f"{graph}: its metadata {CONFIG_KEY} is damaged: {error}; export it again") from error
    if not isinstance(config, dict) or not isinstance(config.get(CLASS_NAME), str):
        raise InputError(f"{graph}: its metadata {CONFIG_KEY} names no {CLASS_NAME}; export it again")
    return config


def _config_text(graph: Path) -> str | None:
    metadata = read_model(graph, external_data=False).metadata_props
    return next((entry.value for entry in metadata if entry.key == CONFIG_KEY), None)
