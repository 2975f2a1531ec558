"""Running a torch model block by block on given tensors: teacher forcing, and what a block gave given again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from exporter.gate.records import OUTPUT, SHARED_PREFIX
from exporter.memory import release_mapped_weights
from exporter.models.adapter import Adapter
from exporter.models.inputs import TransformerInputs, shared_inputs
from exporter.quantize import share_copy


@contextmanager
def boundaries_of(blocks: Sequence[tuple[str, nn.Module]]) -> Iterator[dict[str, Tensor]]:
    """Collect the first block's tensor inputs and every block's output, under the names that the graph uses."""
    seen: dict[str, Tensor] = {}
    first_name, first = blocks[0]

    def keep_inputs(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[f"{first_name}.input"] = args[0]
        seen.update(_shared(kwargs, ()))

    with ExitStack() as hooks:
        hooks.callback(first.register_forward_pre_hook(keep_inputs, with_kwargs=True).remove)
        for name, block in blocks:

            def keep_output(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
                seen[f"{name}.output"] = output

            hooks.callback(block.register_forward_hook(keep_output).remove)
        yield seen


def _shared(kwargs: dict[str, Any], skips: Collection[str]) -> dict[str, Tensor]:
    return {SHARED_PREFIX + name: value for name, value in shared_inputs(kwargs, skips).items()}


def run_forced(
    model: nn.Module, adapter: Adapter, inputs: TransformerInputs, given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the model itself computes when every block, and what follows the last, sees the `given` tensors."""
    with _forced(adapter.blocks(model), adapter.skips(model), given) as own:
        own[OUTPUT] = adapter.forward(model, inputs)
    return own


@contextmanager
def _forced(
    blocks: Sequence[tuple[str, nn.Module]], skips: Mapping[str, Mapping[str, str]], given: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Let every block, and what follows the last, see the `given` tensors; collect what the model itself computes.

    What comes by a skip is an earlier block's output, so it is given already.
    """
    own: dict[str, Tensor] = {}

    def enter(
        name: str, kwargs: dict[str, Any], args: tuple[Any, ...], hidden: Tensor, taken: Collection[str]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if name not in own:
            own[name] = args[0]
        shared = _shared(kwargs, taken)
        own.update({key: value for key, value in shared.items() if key not in own})
        forced = {key: given.get(SHARED_PREFIX + key, value) for key, value in kwargs.items()}
        return (hidden, *args[1:]), forced

    with ExitStack() as hooks:
        hidden_name = f"{blocks[0][0]}.input"
        for name, block in blocks:
            hidden, output_name = given[hidden_name], f"{name}.output"

            def before(
                _module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                hidden: Tensor = hidden,
                hidden_name: str = hidden_name,
                taken: Collection[str] = tuple(skips.get(name, ())),
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                return enter(hidden_name, kwargs, args, hidden, taken)

            def after(_module: nn.Module, _args: Any, output: Tensor, name: str = output_name) -> Tensor:
                own[name] = output
                return given[name]

            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(after).remove)
            hidden_name = output_name
        yield own


@contextmanager
def weights_let_go(blocks: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Let go of mapped weights behind every block, for an engine's builder that may be running beside this."""

    def let_go(_module: nn.Module, _args: Any, _output: Any) -> None:
        release_mapped_weights()

    with ExitStack() as hooks:
        for _, block in blocks:
            hooks.callback(block.register_forward_hook(let_go).remove)
        yield


class _KnownBlock(nn.Module):
    """Gives what a block gave; it has the block's parts, since a model may use some of them elsewhere."""

    def __init__(self, block: nn.Module, output: Tensor) -> None:
        super().__init__()
        self._output = (output,)
        for name, part in block.named_children():
            self.add_module(name, part)

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return self._output[0]


def with_known_blocks(model: nn.Module, adapter: Adapter, seen: dict[str, Tensor]) -> nn.Module:
    """A copy of `model`, on the same memory, whose blocks give what was `seen` of them.

    A block with hooks of its own, which name its arguments (`GenericAdapter`), stays and runs again.
    """
    copy = share_copy(model)
    for name, block in adapter.blocks(model):
        if not block._forward_pre_hooks:  # torch has no public list of them
            copy.set_submodule(name, _KnownBlock(block, seen[f"{name}.output"]))
    return copy
