"""Statistics of the planned layers' inputs, of as many layers at a time as memory has room for their Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from exporter.calibration.input_statistics import InputStatistics
from exporter.calibration.inputs import CalibrationRun
from exporter.layer_checks import check_sign
from exporter.plan import LayerPlan
from exporter.progress import Progress

_FLOAT32 = 4


class InputParts:
    """Makes statistics when they are asked for, by running the original `model` over the calibration set once for every
    part of `layers` that fits `run.memory`, and keeps those of one part.

    Gram matrices are made for layers of at most `largest_gram` inputs. How many parts there are changes no bit. The
    processes of a `run` that is shared out make this together, and ask for the same.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LayerPlan], run: CalibrationRun, largest_gram: int) -> None:
        self._model, self._run, self._largest_gram = model, run, largest_gram
        # The least of all processes': they have to agree on the parts.
        memory = None if run.memory is None else -run.shard.largest(-float(run.memory))
        sizes = [_gram_bytes(layer, largest_gram) for layer in layers]
        self.bytes = sum(sizes)
        self._parts: list[list[str]] = []
        room = 0.0
        for layer, size in zip(layers, sizes, strict=True):
            if not self._parts or (memory is not None and size > room):
                self._parts.append([])
                room = memory or 0.0
            self._parts[-1].append(layer.name)
            room -= size
        self._made: list[str] = []
        self._statistics: Mapping[str, InputStatistics] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def note_parts(self, progress: Progress) -> None:
        """Say so if there are several, each of which takes a run over all captured inputs."""
        if len(self) > 1:
            progress.note(
                f"Gram matrices of the layers' inputs: up to {self.bytes / 1e9:.1f} GB, made in {len(self)} parts, "
                "each with a run over all captured inputs, since calibration.memory has no room for them"
            )

    def of(self, layers: Sequence[LayerPlan]) -> Iterator[tuple[Sequence[LayerPlan], Mapping[str, InputStatistics]]]:
        """Go through `layers`, some at a time and in order of the parts, with what is known of their inputs, by layer;
        a layer that never runs has no entry. Raises `InputError` for negative inputs in a format that has no sign."""
        for part in self._parts:
            names = set(part)
            here = [layer for layer in layers if layer.name in names]
            if not here:
                continue
            if self._made is not part:
                # Now, so that there are never two parts at once.
                self._made, self._statistics = [], {}
                self._statistics = self._run.input_statistics(self._model, part, self._largest_gram)
                self._made = part
            for layer in here:
                if layer.name in self._statistics:
                    check_sign(layer, self._statistics[layer.name].least)
            yield here, self._statistics


def _gram_bytes(layer: LayerPlan, largest_gram: int) -> int:
    """Bytes of a layer's Gram matrix, at most: layers with the same input share it."""
    return _FLOAT32 * layer.in_features**2 if layer.in_features <= largest_gram else 0
