"""Activations in files are those in memory, and batches shrink until they fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exporter.calibration.activations import ActivationStore, BatchLimit, choose_store
from exporter.calibration.block_inputs import BlockInputs
from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.inputs import CalibrationRun
from exporter.calibration.transfers import Gathered
from exporter.errors import EnvironmentLacksError
from exporter.method_section import MethodSection
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.plan import Plan
from exporter.progress import NullProgress

Planner = Callable[..., Plan]
METHOD = MethodSection(scale_search="absmax", iterations=6, batch_size=8, warmup=0.0)
LEARNED = MethodSection(scale_search="absmax", iterations=40, batch_size=8, learning_rate=0.02)
TOKENS = 16
"""Of a sample of the fixtures' model: its latents are 8 x 8 in patches of 2 x 2."""


class _Greedy(nn.Module):
    """Doubles its input, and asks for more memory than there is when it gets more than `most` samples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            torch.empty(1 << 56, dtype=torch.uint8)
        return 2 * x


def test_batches_shrink_until_they_fit_and_stay_small() -> None:
    x = torch.arange(7 * 3 * 2, dtype=torch.float32).reshape(7, 3, 2)
    inputs, block, limit = BlockInputs(x, {}, {}), _Greedy(most=2), BatchLimit(tokens=3 * 7)
    assert torch.equal(inputs.outputs(block, ActivationStore(), limit), 2 * x)
    assert block.sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    block.sizes.clear()
    assert inputs.squared_error(block, x, limit) == pytest.approx(float(x.square().sum()))
    assert block.sizes == [1] * 7


class _GreedyLearning(nn.Identity):
    """Asks for more memory than there is when gradients of more than three samples are wanted."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(x) > 3:
            torch.empty(1 << 56, dtype=torch.uint8)
        return x


def test_learning_on_smaller_batches_learns_the_same(
    model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts, plan_for: Planner
) -> None:
    plan = plan_for("transformer_blocks.0", group_size=0, activation="none")
    greedy = copy.deepcopy(model)
    greedy.set_submodule("transformer_blocks.0.ff.net.1", _GreedyLearning())
    run = CalibrationRun(adapter, captured, prompts)
    whole, parts = (calibrate(network, plan, run, LEARNED, 0, NullProgress()) for network in (model, greedy))
    assert whole.blocks[0].error_calibrated < 0.96 * whole.blocks[0].error_start
    # Sums in another order; a penalty that counted once per part would weigh four times as much.
    assert parts.blocks[0].error_calibrated == pytest.approx(whole.blocks[0].error_calibrated, rel=1e-3)
    codes = [torch.cat([weight.codes.flatten() for weight in result.weights.values()]) for result in (whole, parts)]
    assert float((codes[0] != codes[1]).float().mean()) < 1e-3


class _GreedyOnce(nn.Module):
    """In the middle of a model: asks for more memory than there is when it gets more than `most` samples."""

    def __init__(self, inner: nn.Module, most: int) -> None:
        super().__init__()
        self.inner, self.most = inner, most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            torch.empty(1 << 56, dtype=torch.uint8)
        return self.inner(x)


def test_statistics_count_every_sample_once_where_batches_shrink(
    model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts
) -> None:
    names = [f"transformer_blocks.{block}.ff.net.{layer}" for block in (0, 1) for layer in ("0.proj", "2")]
    greedy = copy.deepcopy(model)
    greedy.set_submodule("transformer_blocks.1.norm2", _GreedyOnce(greedy.transformer_blocks[1].norm2, most=5))
    few, many = (
        CalibrationRun(adapter, captured, prompts, limit=BatchLimit(14 * TOKENS)).input_statistics(network, names, 1000)
        for network in (greedy, model)
    )
    for name in names:
        assert few[name].amax == pytest.approx(many[name].amax, rel=1e-5)
        assert torch.allclose(few[name].mean_square, many[name].mean_square, rtol=1e-4)
        assert torch.allclose(few[name].gram, many[name].gram, rtol=1e-3, atol=1e-3 * float(many[name].gram.max()))


def test_a_single_sample_that_does_not_fit_is_said_so() -> None:
    inputs = BlockInputs(torch.zeros(2, 3, 2), {}, {})
    with pytest.raises(EnvironmentLacksError, match="a sample of 3 tokens does not fit the memory"):
        inputs.outputs(_Greedy(most=0), ActivationStore(), BatchLimit())


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        BlockInputs(torch.zeros(2, 3, 2), {}, {}).outputs(nn.Linear(5, 1), ActivationStore(), BatchLimit())


@pytest.mark.parametrize(("tokens", "parts"), [(1, [1] * 5), (48, [3, 2]), (1000, [5])])
def test_batches_hold_as_many_samples_as_their_tokens_allow(tokens: int, parts: list[int]) -> None:
    seen: list[int] = []
    BatchLimit(tokens).each(5, TOKENS, lambda part: seen.append(part.stop - part.start))
    assert seen == parts


@pytest.mark.parametrize("prefixes", [("transformer_blocks",), ("caption_projection.linear_1", "transformer_blocks.1")])
def test_calibration_with_activations_in_files_gives_the_same_bits(
    prefixes: tuple[str, ...],
    model: nn.Module,
    adapter: PixArtAdapter,
    captured: CalibrationSet,
    prompts: Prompts,
    plan_for: Planner,
    tmp_path: Path,
) -> None:
    plan = plan_for(*prefixes, group_size=0)
    in_memory, in_files = (
        calibrate(model, plan, CalibrationRun(adapter, captured, prompts, store=store), METHOD, 0, NullProgress())
        for store in (ActivationStore(), ActivationStore(tmp_path))
    )
    assert [replace(block, seconds=0.0) for block in in_memory.blocks] == [
        replace(block, seconds=0.0) for block in in_files.blocks
    ]
    for name, weight in in_memory.weights.items():
        assert torch.equal(weight.codes, in_files.weights[name].codes)
    assert list(tmp_path.iterdir()) == []


def test_files_take_no_memory_of_the_process(tmp_path: Path) -> None:
    def private() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    size = 1 << 26
    before = private()
    kept = [ActivationStore(tmp_path).empty((size // 4,), torch.float32).fill_(1.0)]
    assert private() - before < size / 4
    kept.append(ActivationStore().empty((size // 4,), torch.float32).fill_(1.0))
    assert private() - before > size * 0.75
    assert torch.equal(*kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_files_hold_every_type_and_shape(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    kept = ActivationStore(tmp_path).empty(values.shape, dtype)
    kept[:] = values
    assert torch.equal(kept, values)
    assert ActivationStore(tmp_path).empty((0, 3), dtype).shape == (0, 3)


def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentLacksError, match=r"GB for activations: .*run the same command again"):
        ActivationStore(tmp_path).empty((1 << 61,), torch.uint8)
    assert list(tmp_path.iterdir()) == []


def test_inputs_of_blocks_and_layers_do_not_depend_on_how_many_go_at_once(
    model: nn.Module, adapter: PixArtAdapter, captured: CalibrationSet, prompts: Prompts
) -> None:
    runs = [CalibrationRun(adapter, captured, prompts, limit=BatchLimit(tokens)) for tokens in (5 * TOKENS, 10_000)]
    few, many = (run.block_inputs(model, adapter.blocks(model)[0][1]) for run in runs)
    assert len(few) == len(many) == len(captured)
    assert torch.allclose(few.hidden, many.hidden, atol=1e-5)
    assert few.shared.keys() == many.shared.keys() > set()
    few, many = (run.layer_inputs(model, "transformer_blocks.1.ff.net.2") for run in runs)
    assert torch.allclose(few, many, atol=1e-4)
    statistics = [run.input_statistics(model, ["transformer_blocks.1.ff.net.2"], 1000) for run in runs]
    for one, other in zip(*(result.values() for result in statistics), strict=True):
        assert one.amax == pytest.approx(other.amax, rel=1e-5)
        assert torch.allclose(one.mean_square, other.mean_square, rtol=1e-4)
        assert torch.allclose(one.gram, other.gram, rtol=1e-3, atol=1e-3 * float(one.gram.max()))


def test_activations_go_to_files_where_memory_does_not_suffice(tmp_path: Path) -> None:
    assert choose_store(10, 100, 1000, tmp_path).folder is None
    assert choose_store(10, 100, 999, tmp_path).folder == tmp_path
    with pytest.raises(EnvironmentLacksError, match=r"need 1\d+\.0 GB .* at most \d+ fit"):
        choose_store(1_000_000, 10**9 // 2 * 200, 999, tmp_path)


def test_parts_of_a_tensor_may_come_again() -> None:
    values = torch.arange(12.0).reshape(6, 2)
    gathered = Gathered(6, ActivationStore())
    for part in (slice(0, 4), slice(0, 2), slice(2, 4), slice(4, 6)):
        gathered.put(part, values[part])
    assert torch.equal(gathered.tensor, values)
    with pytest.raises(ValueError, match="no samples"):
        _ = Gathered(0, ActivationStore()).tensor
