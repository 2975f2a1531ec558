"""Loading a checkpoint: everything that can be wrong with it is found here, named, and told in one line."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from exporter.errors import EnvironmentLacksError, InputError, did_you_mean
from exporter.explain import explain
from exporter.models.adapter import Adapter
from exporter.models.families import ADAPTERS
from exporter.models.generic import ANY_CLASS
from exporter.models.location import CONFIG, read_config
from exporter.models.weight_files import read_tensors, weight_files
from exporter.plan import LinearShape, ModelShapes

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MOST_NAMED = 3


def load_transformer(transformer: Path, adapter: Adapter, variant: str | None = None) -> nn.Module:
    """The model in the directory `transformer` (see `find_model`): float32, in eval mode, without gradients.

    Half-precision checkpoints are widened. Tensors are read one by one straight into place, so the peak is little
    over the model's own size. Raises `InputError`.
    """
    config = read_config(transformer)
    model = skeleton(config, adapter, transformer / CONFIG)
    wanted = model.state_dict()
    files = weight_files(transformer, variant)
    state: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file):
            state[name] = _checked(tensor, name, wanted, file)
    missing = [name for name in wanted if name not in state]
    if missing:
        raise InputError(f"{transformer}: the weights lack {_named(missing)} that {CONFIG} asks for")
    model.load_state_dict(state, strict=True, assign=True)
    adapter.share_weights(model)
    return model.eval().requires_grad_(False)


def skeleton(config: dict[str, Any], adapter: Adapter, file: Path) -> nn.Module:
    """The model that a config describes, its parameters without memory. Raises `InputError` naming `file`."""
    name = config.get("_class_name")
    if adapter.class_name not in (name, ANY_CLASS):
        found = f"_class_name is {name!r}" if name is not None else "there is no _class_name"
        supported = ", ".join(f"{entry.family} ({entry.class_name})" for entry in ADAPTERS.values())
        raise InputError(
            f"{file}: {found}, but family {adapter.family} is {adapter.class_name}; supported: {supported}; "
            "family generic takes others that a recipe describes; docs/architecture.md shows how to add one"
        )
    try:
        adapter.parse_config(config)
    except ValidationError as error:
        problem = explain(error, adapter.config_class)
        place = f"{problem.path}: " if problem.path else ""
        raise InputError(f"{file}: {place}{problem.message}") from error
    try:
        return adapter.create(config)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: diffusers refuses it: {error}") from error
    except ImportError as error:
        raise EnvironmentLacksError(f"diffusers cannot be imported: {error}; pip install diffusers") from error


def model_shapes(model: nn.Module, adapter: Adapter) -> ModelShapes:
    """Shapes of the linear layers that can be quantized and parameter counts of everything else; no weights needed."""
    linears: dict[str, LinearShape] = {}
    others: dict[str, int] = {}
    for name, module in model.named_modules():
        fixed = any(fnmatchcase(name, pattern) for pattern in adapter.never_quantized)
        if isinstance(module, nn.Linear) and not fixed:
            linears[name] = LinearShape(module.out_features, module.in_features, module.bias is not None)
            continue
        for key, parameter in module.named_parameters(recurse=False):
            path = name or key
            others[path] = others.get(path, 0) + parameter.numel()
    return ModelShapes(linears, others)


def _checked(tensor: Tensor, name: str, wanted: Mapping[str, Tensor], file: Path) -> Tensor:
    """The tensor in float32, if the model has one of that name and shape and all of it is finite."""
    if name not in wanted:
        raise InputError(
            f"{file}: {name} is not part of the model that {CONFIG} describes" + did_you_mean(name, wanted)
        )
    if tensor.shape != wanted[name].shape:
        raise InputError(
            f"{file}: {name} has shape {list(tensor.shape)}, but {CONFIG} asks for {list(wanted[name].shape)}"
        )
    if tensor.dtype not in _FLOATS:
        raise InputError(
            f"{file}: {name} holds {str(tensor.dtype).removeprefix('torch.')}; expected floating-point weights"
        )
    values = tensor.to(torch.float32)
    # The smallest and the largest are NaN where any value is: one pass, and nothing as large as the weights.
    if values.numel() and not bool(torch.stack(values.aminmax()).isfinite().all()):
        nans, infs = int(values.isnan().sum()), int(values.isinf().sum())
        raise InputError(f"{file}: {name} is damaged: {nans} NaN and {infs} Inf among {values.numel()} values")
    return values


def _named(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
