"""`EngineTransformer`: an exported file in the place of a diffusers pipeline's transformer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from exporter.errors import InputError
from exporter.runtime.engine import Engine
from exporter.runtime.open import open_engine
from exporter.transformer_config import CLASS_NAME, config_of_output

# What pipelines always pass, and a model takes or ignores by its config.
_SWITCHED_BY_CONFIG = ("resolution", "aspect_ratio", "style", "image_meta_size")


class EngineTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc] # diffusers carries no type information
    """Stands in for `pipe.transformer`: same call, config and output; all else stays the pipeline's.

    pipe = PixArtAlphaPipeline.from_pretrained(folder, transformer=EngineTransformer.load("pixart.onnx"))

    A module without parameters, so that `pipe.to(...)` moves the other components and leaves the engine where it is.
    """

    def __init__(self, engine: Engine, config: Mapping[str, Any]) -> None:
        """Take the place of the diffusers model that `config` (its config.json) describes.

        Raises `InputError` for a class of model that is not known.
        """
        super().__init__()
        name = config.get(CLASS_NAME)
        model_class: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
        is_model = inspect.isclass(model_class) and issubclass(model_class, ModelMixin)
        if not is_model:
            raise InputError(f"{engine.name}: stands for {name!r}, which is no model of this diffusers")
        parameters = inspect.signature(model_class.__init__).parameters
        defaults = {key: value.default for key, value in parameters.items() if value.default is not value.empty}
        self.engine = engine
        self.register_to_config(**{**defaults, **config})
        self._call = inspect.signature(model_class.forward)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: str | Path | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> EngineTransformer:
        """Open the .onnx, .plan or .engine file at `path`.

        `model` is the directory of the original with its config.json, needed only where the file does not carry the
        config itself; `device` is by default the CPU for .onnx and the GPU for engines; `threads` limits the CPU
        threads of one operator. Raises `InputError`, or `EnvironmentLacksError` where the runtime or the device is not
        here.
        """
        file = Path(path)
        engine = open_engine(file, device, threads)
        return cls(engine, config_of_output(file, None if model is None else Path(model)))

    @property
    def dtype(self) -> torch.dtype:
        """What the pipeline makes latents and prompt embeddings in; the engine converts to its own types."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return self.engine.device

    @property
    def num_heads(self) -> int:
        """Attention heads, which HunyuanDiTPipeline asks for."""
        return int(self.config["num_attention_heads"])

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream, which HunyuanDiTPipeline asks for."""
        return self.num_heads * int(self.config["attention_head_dim"])

    @property
    def text_tokens(self) -> int | None:
        """How many tokens every prompt embedding has, None where the engine takes any number or no text."""
        for spec in self.engine.inputs:
            if spec.name == "encoder_hidden_states" and isinstance(spec.shape[1], int):
                return spec.shape[1]
        return None

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents that the engine was exported for."""
        shape = next(spec.shape for spec in self.engine.inputs if spec.name == "hidden_states")
        height, width = shape[-2:]
        if isinstance(height, str) or isinstance(width, str):
            size = int(self.config["sample_size"])
            return size, size
        return height, width

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Predict as the diffusers model does, with its own arguments, in the latents' type and on their device.

        Raises `InputError` for an input that the engine does not have, or that it has and that is missing.
        """
        given = self._call.bind(self, *args, **kwargs).arguments
        latents = given["hidden_states"]
        tensors = dict(_named_tensors({name: value for name, value in given.items() if name != "self"}))
        known = {spec.name for spec in self.engine.inputs}
        fed = {name: value for name, value in tensors.items() if name in known or name not in _SWITCHED_BY_CONFIG}
        sample = self.engine.run(fed).to(latents)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _named_tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(graph input, tensor) of a call's arguments; a dictionary's entries are inputs of their own names."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _named_tensors(value)
