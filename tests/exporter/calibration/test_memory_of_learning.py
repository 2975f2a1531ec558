"""What learning keeps in memory: copies of one unit's weights at a time, and gradients of as many tokens as there is
room for."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from exporter.calibration.block_inputs import BlockInputs
from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.gradient_memory import tokens_at_once
from exporter.calibration.inputs import CalibrationRun
from exporter.calibration.nearest import nearest_weight
from exporter.calibration.placement import LEARNED_BLOCK
from exporter.calibration.reconstruction import Execution, Unit, reconstruct
from exporter.calibration.rounding_linear import RoundingLinear
from exporter.method_section import MethodSection
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.plan import LayerPlan, Plan
from exporter.progress import NullProgress, Task

Planner = Callable[..., Plan]
LEARNED = MethodSection(scale_search="absmax", iterations=2, batch_size=8, warmup=0.0)
FLOAT32 = 4


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
            # By type: `isinstance` asks lazy modules for their class, and sizes of fake tensors are no numbers.
            tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
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


def test_a_sample_takes_two_and_a_half_times_what_is_kept_for_its_gradients_however_large_the_weights_are() -> None:
    linear, x = nn.Linear(48, 80), torch.randn(1, 5, 48)

    def forward(samples: int) -> Tensor:
        # For gradients of the weights, the squares and the sines: the inputs, and once the outputs.
        y = linear(x.expand(samples, -1, -1).contiguous())
        return (y.square() + y.sin()).sum()

    sample = 2.5 * 5 * (48 + 80) * FLOAT32
    assert tokens_at_once(forward, 5, 4 * sample) == 4 * 5
    # Powers of two, so that it does not change with a little more or less.
    assert tokens_at_once(forward, 5, 4 * sample - 1) == 2 * 5
    assert tokens_at_once(forward, 5, 2 * sample) == 2 * 5
    assert tokens_at_once(forward, 5, -1.0) == 5
    assert linear.weight.grad is None


class _Noted(nn.GELU):
    """Tells how many samples gradients come for at once; a copy of it tells the same function."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        super().__init__()
        self.tell = tell

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda gradient: self.tell(len(gradient)))
        return super().forward(x)


WIDTH, TOKENS, SAMPLES = 32, 6, 24
BATCH = MethodSection(iterations=30, batch_size=8, learning_rate=0.02, warmup=0.3)


def _learned(memory: int | None) -> tuple[list[int], Tensor, float]:
    """Samples of every part that was learned from, codes and the error of a unit of two layers, 8 samples a batch."""
    torch.manual_seed(3)
    layers = {}
    for name in ("0", "2"):
        plan = LayerPlan(name, WIDTH, WIDTH, True, "e2m1", "none", 0, "channel", "int8")
        linear = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        layers[name] = RoundingLinear(plan, linear, nearest_weight(linear.weight, plan, None, "absmax"), False)
    sizes: list[int] = []
    noted = _Noted(lambda size: sizes.append(size))
    unit = Unit("unit", nn.Sequential(layers["0"], noted, layers["2"]), layers)
    inputs, targets = (torch.randn(SAMPLES, TOKENS, WIDTH) for _ in range(2))
    generator, execution = torch.Generator().manual_seed(7), Execution(memory=memory)
    with NullProgress().task("learn", BATCH.iterations) as task:
        found = reconstruct(unit, BlockInputs(inputs, {}, {}), targets, BATCH, generator, execution, task)
    return sizes, torch.stack([layer.quantized.codes for layer in layers.values()]), found.error_calibrated


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_a_batch_for_which_there_is_no_memory_is_learned_from_in_parts(samples: int) -> None:
    whole_sizes, whole, error = _learned(None)
    assert whole_sizes == [8] * BATCH.iterations
    # Kept of a sample: the inputs of both layers and of the GELU between them, the output and its target.
    sample = 2.5 * 5 * TOKENS * WIDTH * FLOAT32
    roundings = LEARNED_BLOCK * 2 * WIDTH**2 * FLOAT32
    sizes, parts, its_error = _learned(int(roundings + samples * sample))
    assert sizes == {1: [1] * 8, 2: [2] * 4, 3: [2] * 4}[samples] * BATCH.iterations
    assert float((parts != whole).float().mean()) < 1e-3
    assert its_error == pytest.approx(error, rel=1e-3)
    # With room for all of them nothing changes, whatever else there is.
    sizes, codes, its_error = _learned(int(roundings + 8 * sample))
    assert (sizes, its_error) == (whole_sizes, error)
    assert torch.equal(codes, whole)


def test_calibration_memory_bounds_what_is_learned_from_at_once(
    model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts, plan_for: Planner
) -> None:
    sizes: list[int] = []
    watched = copy.deepcopy(model)
    watched.set_submodule("transformer_blocks.0.ff.net.1", _Noted(lambda size: sizes.append(size)))
    plan = plan_for("transformer_blocks.0", group_size=0)
    for memory, parts in ((10**9, [8]), (1, [1] * 8)):
        sizes.clear()
        run = CalibrationRun(adapter, captured, prompts, memory=memory)
        calibrate(watched, plan, run, LEARNED, 0, NullProgress())
        assert sizes == parts * LEARNED.iterations
