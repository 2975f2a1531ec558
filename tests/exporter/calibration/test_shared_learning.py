"""Two processes learn what one does, a unit and a whole calibration: the same batches, sums in another order."""

from __future__ import annotations

import math
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from exporter.calibration.activations import BatchLimit
from exporter.calibration.block_inputs import BlockInputs
from exporter.calibration.calibrate import calibrate
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.finished import UnitFiles
from exporter.calibration.input_statistics import InputStatistics, InputSums
from exporter.calibration.inputs import CalibrationRun
from exporter.calibration.layer_reconstruction import LayerError
from exporter.calibration.nearest import nearest_weight
from exporter.calibration.reconstruction import Execution, Unit, draw_batch, reconstruct
from exporter.calibration.rounding_linear import RoundingLinear
from exporter.method_section import MethodSection
from exporter.models.inputs import Condition, TransformerInputs
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import class_prompts
from exporter.plan import LayerPlan, Plan
from exporter.progress import NullProgress
from exporter.quantize import BlockStatistics
from exporter.shards import Shard
from exporter.workdir import WorkDir

SAMPLES, TOKENS, WIDTH = 24, 8, 64
METHOD = MethodSection(iterations=40, batch_size=8, learning_rate=0.02)


def _original() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)


def _unit() -> Unit:
    original, layers = _original(), {}
    for name in ("0", "2"):
        linear = original.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        plan = LayerPlan(name, WIDTH, WIDTH, True, "e2m1", "none", 0, "channel", "int8")
        weight = nearest_weight(linear.weight, plan, None, "absmax")
        layers[name] = RoundingLinear(plan, linear, weight, activations=False)
    return Unit("unit", nn.Sequential(layers["0"], nn.GELU(), layers["2"]), layers)


def _reconstruct(inputs: BlockInputs, targets: torch.Tensor, shard: Shard) -> tuple[BlockStatistics, torch.Tensor]:
    """Errors and codes of a unit that begins at its unrounded weights."""
    unit = _unit()
    with NullProgress().task("learn", METHOD.iterations) as task:
        generator = torch.Generator().manual_seed(7)
        statistics = reconstruct(unit, inputs, targets, METHOD, generator, Execution(shard=shard), task)
    return statistics, torch.stack([layer.quantized.codes for layer in unit.layers.values()])


def _learn(shard: Shard) -> dict[str, torch.Tensor]:
    """Codes, errors and statistics, with any targets, and codes with those that the original makes of the inputs."""
    generator = torch.Generator().manual_seed(5)
    inputs, targets = (torch.randn(SAMPLES, TOKENS, WIDTH, generator=generator) for _ in range(2))
    own = slice(shard.rank, None, shard.world)
    weights = torch.rand(SAMPLES, generator=generator)
    given = BlockInputs(inputs[own], {}, {}, weights=weights[own])
    statistics, codes = _reconstruct(given, targets[own], shard)
    _, exact = _reconstruct(given, _original()(inputs[own]), shard)
    error = LayerError.of(_unit().layers["0"], given, replace(given, hidden=given.hidden * 1.1), BatchLimit(), shard)
    sums = InputSums(SAMPLES, largest_gram=WIDTH, shard=shard, weights=weights)
    for part in inputs[own].split(5):
        sums.add("layer", part)
    seen: InputStatistics = sums.result()["layer"]
    assert seen.gram is not None
    return {
        "errors": torch.tensor([statistics.error_start, statistics.error_calibrated], dtype=torch.float64),
        "codes": codes,
        "exact codes": exact,
        "layer pull": error.pull,
        "layer power": error.power,
        "mean_square": seen.mean_square,
        "gram": seen.gram,
        "amax": torch.tensor(seen.amax),
    }


class _TwoBlocks(nn.Module):
    """The smallest model with blocks: each mixes the channels of every token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class _Adapter(PixArtAdapter):
    """Latents [B, 1, tokens, width] are the tokens."""

    blocks_path = "blocks"

    def forward(self, model: nn.Module, inputs: TransformerInputs) -> torch.Tensor:
        output: torch.Tensor = model(inputs.hidden_states.squeeze(1))
        return output

    def tokens(self, model: nn.Module, latent_shape: tuple[int, int, int]) -> int:
        return latent_shape[1]


def _calibrate(shard: Shard, folder: Path) -> dict[str, torch.Tensor]:
    """A whole calibration: scales, error feedback, and block after block on the outputs of the one before."""
    model = _TwoBlocks().requires_grad_(False)
    layers = tuple(
        LayerPlan(f"blocks.{block}.{layer}", WIDTH, WIDTH, True, "e2m1", "none", 0, "channel", "int8")
        for block in range(2)
        for layer in (0, 2)
    )
    plan = Plan(layers=layers, high_precision=(), fp32_bytes=0, expected_bytes=0)
    latents = torch.randn(4 * SAMPLES, 1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(len(latents), dtype=torch.int64)
    captured = CalibrationSet(latents, zeros.float(), zeros, zeros)
    prompts = class_prompts(Condition("class_labels", "class_labels", (), "label", classes=1), [0], 0)
    method = METHOD.model_copy(update={"scale_search": "absmax", "start": "gptq", "learning_rate": 0.01})
    folder.mkdir(exist_ok=True)
    units = UnitFiles(WorkDir(folder), plan, {}, shard)
    if shard.is_first:
        units.begin()
    shard.wait()
    result = calibrate(
        model, plan, CalibrationRun(_Adapter(), captured, prompts, shard=shard), method, 0, NullProgress(), units
    )
    errors = torch.tensor([(block.error_start, block.error_calibrated) for block in result.blocks[-2:]])
    return {"block errors": errors} | {
        f"block {block} codes": torch.stack([result.weights[f"blocks.{block}.{layer}"].codes for layer in (0, 2)])
        for block in range(2)
    }


def _process(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    shard = Shard(rank, world, rank)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    save_file(_learn(shard) | _calibrate(shard, Path(folder) / "shared"), Path(folder) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (2, port, str(tmp_path)), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = _learn(Shard()) | _calibrate(Shard(), tmp_path / "alone")
    assert float(alone["errors"][1]) < 0.999 * float(alone["errors"][0])
    assert torch.allclose(first["errors"], alone["errors"], rtol=1e-4)
    assert float((first["codes"] != alone["codes"]).float().mean()) < 1e-3
    assert float((first["exact codes"] != alone["exact codes"]).float().mean()) < 1e-3
    # A whole calibration agrees but for ties, and whatever they change behind them: here none.
    assert bool((alone["block errors"][:, 1] < 0.95 * alone["block errors"][:, 0]).all())
    assert torch.allclose(first["block errors"], alone["block errors"], rtol=1e-3)
    for codes in ("block 0 codes", "block 1 codes"):
        assert float((first[codes] != alone[codes]).float().mean()) < 1e-3
    assert torch.allclose(first["layer pull"], alone["layer pull"], rtol=1e-4, atol=1e-3)
    assert torch.allclose(first["layer power"], alone["layer power"], rtol=1e-5)
    assert first["amax"] == alone["amax"]
    assert torch.allclose(first["mean_square"], alone["mean_square"], rtol=1e-5)
    assert torch.allclose(first["gram"], alone["gram"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("count", "batch_size"), [(24, 8), (40, 32), (25, 8), (30, 8), (8, 8), (5, 8)])
def test_batches_hold_every_sample_equally_often_and_every_process_its_share(count: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_batch(count, batch_size, generator) for _ in range(800)])
    assert drawn.shape == (800, batch_size)
    often = drawn.flatten().bincount(minlength=count) / 800
    assert len(often) == count
    assert torch.allclose(often, torch.full((count,), batch_size / count), atol=0.08)
    if count >= batch_size:
        assert all(len(set(batch)) == batch_size for batch in drawn.tolist())
    for world in (world for world in (2, 4, 8) if math.gcd(count, batch_size) % world == 0):
        shares = torch.nn.functional.one_hot(drawn % world, world).sum(dim=1)
        assert bool((shares == batch_size // world).all())
