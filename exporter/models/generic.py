"""Any other diffusers transformer whose blocks are made of linear layers, as far as a recipe can describe it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import InputError, did_you_mean
from exporter.models.adapter import Adapter, config_of
from exporter.models.channel_folds import ChannelFold
from exporter.models.config import TransformerConfig, Width
from exporter.models.inputs import HIDDEN_STATES, TIMESTEP, Condition, TransformerInputs

ANY_CLASS = "*"


class GenericConfig(TransformerConfig):
    """What has to be in the config."""

    num_attention_heads: Width
    attention_head_dim: Width
    in_channels: Width
    sample_size: Width
    patch_size: Width = 1


class _Forward(nn.Module):
    """The transformer with positional inputs and its plain output, as torch.export wants it."""

    def __init__(self, transformer: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.transformer = transformer
        self.names = tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.names, tensors, strict=True))
        output: Tensor = self.transformer(**named, return_dict=False)[0]
        return output


class GenericAdapter(Adapter):
    """A transformer that the recipe describes: `model.inputs` are its inputs beside hidden_states [B, C, H, W] and
    timestep [B], with one sample's sizes (null: as the prompts file has it), all floats; `model.blocks` is the module
    path of its blocks where there is more than one list of modules.

    Only linear layers inside the blocks are quantized, unless a rule says otherwise; `check` says what has to hold.
    """

    family = "generic"
    high_precision = ()
    class_name = ANY_CLASS
    config_class = GenericConfig
    training_noise = None

    def __init__(self, inputs: Mapping[str, Sequence[int | None]], blocks: str | None) -> None:
        self._inputs = {name: tuple(sizes) for name, sizes in inputs.items()}
        self._blocks = blocks

    def create(self, config: dict[str, Any]) -> nn.Module:
        import diffusers
        from diffusers import ModelMixin
        from diffusers.models.modeling_utils import no_init_weights

        name = config.get("_class_name")
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
        if not (inspect.isclass(found) and issubclass(found, ModelMixin)):
            raise InputError(f"_class_name is {name!r}, which is no model of diffusers")
        model_class: Any = found
        known = inspect.signature(model_class).parameters
        # Not on the meta device: buffers may be computed. Memory that nothing writes to costs nothing.
        with no_init_weights():
            model: nn.Module = model_class(**{key: value for key, value in config.items() if key in known})
        self._check_inputs(model)
        for _, block in self.blocks(model):
            block.register_forward_pre_hook(_name_arguments, with_kwargs=True)
        return model

    def _check_inputs(self, model: nn.Module) -> None:
        kind = type(model).__name__
        parameters = inspect.signature(model.forward).parameters
        needed = [name for name, one in parameters.items() if one.default is one.empty and one.kind != one.VAR_KEYWORD]
        for name in (HIDDEN_STATES, TIMESTEP, *self._inputs):
            if name not in parameters:
                raise InputError(f"model.inputs: {kind} takes no {name!r}{did_you_mean(name, list(parameters))}")
        missing = [name for name in needed if name not in (HIDDEN_STATES, TIMESTEP, *self._inputs)]
        if missing:
            raise InputError(f"model.inputs: {kind} also needs {', '.join(missing)}: give the sizes of one sample")

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        lists = {
            name: module
            for name, module in model.named_children()
            # Quantized layers are no nn.Linear any more.
            if isinstance(module, nn.ModuleList) and any(hasattr(part, "in_features") for part in module.modules())
        }
        path = self._blocks if self._blocks is not None else next(iter(lists), None)
        if path is None or path not in lists or (self._blocks is None and len(lists) > 1):
            found = ", ".join(lists) or "none"
            raise InputError(f"model.blocks: give the list of blocks; lists with linear layers here: {found}")
        return [(f"{path}.{index}", block) for index, block in enumerate(lists[path])]

    def kept_layers(self, model: nn.Module) -> tuple[str, ...]:
        inside = tuple(f"{name}." for name, _ in self.blocks(model))
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return tuple(name for name in linears if not name.startswith(inside))

    def conditions(self, model: nn.Module) -> tuple[Condition, ...]:
        return tuple(Condition(name, name, sizes) for name, sizes in self._inputs.items())

    def channel_folds(self, model: nn.Module) -> tuple[ChannelFold, ...]:
        """None: what is in front of the layers is not known, so a recipe that asks for it is refused."""
        return ()

    def forward_module(self, model: nn.Module, inputs: TransformerInputs) -> nn.Module:
        return _Forward(model, self.input_names(model))

    def config(self, model: nn.Module) -> GenericConfig:
        return GenericConfig.model_validate(config_of(model))

    @torch.no_grad()
    def check(self, model: nn.Module, inputs: TransformerInputs) -> None:
        """Run the model once and raise `InputError` unless its blocks can be taken apart.

        Each gets the one before's output as its first argument and returns one tensor; all other tensors are the same
        for all blocks and have the batch as first axis; every linear layer in the blocks runs once.
        """
        calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
        runs: dict[str, int] = {}
        hooks = []
        for name, block in self.blocks(model):

            def keep(
                _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str = name
            ) -> None:
                calls.append((name, args, kwargs, output))

            hooks.append(block.register_forward_hook(keep, with_kwargs=True))
            for path, module in block.named_modules(prefix=name):
                if isinstance(module, nn.Linear):

                    def count(_module: nn.Module, _args: Any, path: str = path) -> None:
                        runs[path] = runs.get(path, 0) + 1

                    runs[path] = 0
                    hooks.append(module.register_forward_pre_hook(count))
        try:
            self.forward(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        _check_calls(calls, [name for name, _ in self.blocks(model)], inputs.batch)
        odd = next((path for path, times in runs.items() if times != 1), None)
        if odd is not None:
            raise InputError(
                f"{odd} runs {runs[odd]} times; only layers that run once can be quantized. {_OWN_ADAPTER}"
            )


_OWN_ADAPTER = "A model like this needs an adapter of its own: docs/architecture.md"


def _check_calls(
    calls: Sequence[tuple[str, tuple[Any, ...], dict[str, Any], Any]], names: Sequence[str], batch: int
) -> None:
    if [name for name, *_ in calls] != list(names):
        raise InputError(f"the blocks do not run one after the other, once each. {_OWN_ADAPTER}")
    before: Any = calls[0][1][0] if calls[0][1] else None
    for name, args, kwargs, output in calls:
        if not isinstance(output, Tensor) or len(args) != 1 or args[0] is not before:
            raise InputError(f"{name} does not turn the one before's output into one tensor. {_OWN_ADAPTER}")
        first = calls[0][2]
        tensors = {key for key, value in kwargs.items() if isinstance(value, Tensor)}
        if kwargs.keys() != first.keys() or any(kwargs[key] is not first[key] for key in tensors):
            raise InputError(f"{name} takes other arguments than {calls[0][0]}. {_OWN_ADAPTER}")
        odd = next((key for key in sorted(tensors) if kwargs[key].ndim == 0 or len(kwargs[key]) != batch), None)
        if odd is not None:
            raise InputError(f"{name} takes {odd}, which has no batch axis. {_OWN_ADAPTER}")
        before = output


def _name_arguments(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All arguments of a block but the first by name, so that they can be told apart."""
    names = list(inspect.signature(block.forward).parameters)
    return args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
