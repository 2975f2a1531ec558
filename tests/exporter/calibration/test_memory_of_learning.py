"""What learning keeps in memory: copies of one unit's weights at a time, and gradients of as many tokens as there is
room for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.inputs import CalibrationRun
from exporter.method_section import MethodSection
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.plan import Plan
from exporter.progress import NullProgress, Task

Planner = Callable[..., Plan]
LEARNED = MethodSection(scale_search="absmax", iterations=2, batch_size=8, warmup=0.0)


class _Watched(NullProgress):
    """Counts, whenever a unit begins to be learned, the tensors of planned weights' shapes that are not the model's:
    unit → how many with floating-point numbers, and how many with codes."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.counts: dict[str, tuple[int, int]] = {}
        self._own = {parameter.data_ptr() for parameter in model.parameters()}
        self._shapes = {(layer.out_features, layer.in_features) for layer in plan.layers}

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        what, _, unit = title.partition(" ")
        if what == "calibrate":
            # By type: `isinstance` asks lazy modules among them for their class.
            tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
            weights = [one for one in tensors if tuple(one.shape) in self._shapes]
            found = {one.data_ptr(): one.dtype.is_floating_point for one in weights}
            kinds = [floating for place, floating in found.items() if place not in self._own]
            self.counts[unit] = kinds.count(True), kinds.count(False)
        with super().task(title, total) as task:
            yield task


def test_only_the_unit_that_is_learned_has_copies_of_its_weights(
    model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts, plan_for: Planner
) -> None:
    plan = plan_for("caption_projection.linear_1", "transformer_blocks", "proj_out", group_size=0)
    # What earlier tests have left, which the collector could take away meanwhile; of a unit nothing is left to it.
    gc.collect()
    before = _Watched(model, plan)
    with before.task("calibrate nothing", 0):
        floating, codes = before.counts["nothing"]
    watched = _Watched(model, plan)
    calibrate(model, plan, CalibrationRun(adapter, captured, prompts), LEARNED, 0, watched)
    for unit in ("caption_projection.linear_1", "transformer_blocks.0", "transformer_blocks.1", "proj_out"):
        layers = [layer.name for layer in plan.layers if layer.name == unit or layer.name.startswith(f"{unit}.")]
        # Codes of all layers, the first or the learned ones.
        assert watched.counts[unit] == (floating + len(layers), codes + len(plan.layers))
    assert len(watched.counts) == 4
