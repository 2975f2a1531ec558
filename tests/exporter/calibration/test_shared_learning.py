"""Two processes learn one unit's roundings as one does: the same batches, the sums of gradients in another order."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from exporter.calibration.block_inputs import BlockInputs
from exporter.calibration.input_statistics import InputStatistics, InputSums
from exporter.calibration.nearest import nearest_weight
from exporter.calibration.reconstruction import Execution, RoundingLinear, Unit, draw_batch, reconstruct
from exporter.method_section import MethodSection
from exporter.plan import LayerPlan
from exporter.progress import NullProgress
from exporter.shards import Shard

SAMPLES, TOKENS, WIDTH = 24, 8, 64
METHOD = MethodSection(iterations=40, batch_size=8, learning_rate=0.02)


def _unit() -> Unit:
    torch.manual_seed(3)
    layers = {}
    for name in ("0", "2"):
        linear = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        plan = LayerPlan(name, WIDTH, WIDTH, True, "e2m1", "none", 0, "channel", "int8")
        weight = nearest_weight(linear.weight, plan, None, "absmax")
        layers[name] = RoundingLinear(plan, linear, weight, activations=False)
    return Unit("unit", nn.Sequential(layers["0"], nn.GELU(), layers["2"]), layers)


def _learn(shard: Shard) -> dict[str, torch.Tensor]:
    """Codes, errors and statistics; targets are not what the original makes of the inputs, else gradients are noise."""
    generator = torch.Generator().manual_seed(5)
    inputs, targets = (torch.randn(SAMPLES, TOKENS, WIDTH, generator=generator) for _ in range(2))
    unit, own = _unit(), slice(shard.rank, None, shard.world)
    weights = torch.rand(SAMPLES, generator=generator)
    with NullProgress().task("learn", METHOD.iterations) as task:
        statistics = reconstruct(
            unit,
            BlockInputs(inputs[own], {}, {}, weights=weights[own]),
            targets[own],
            METHOD,
            torch.Generator().manual_seed(7),
            Execution(shard=shard),
            task,
        )
    sums = InputSums(SAMPLES, largest_gram=WIDTH, shard=shard, weights=weights)
    for part in inputs[own].split(5):
        sums.add("layer", part)
    seen: InputStatistics = sums.result()["layer"]
    assert seen.gram is not None
    return {
        "errors": torch.tensor([statistics.error_start, statistics.error_calibrated], dtype=torch.float64),
        "codes": torch.stack([layer.quantized.codes for layer in unit.layers.values()]),
        "mean_square": seen.mean_square,
        "gram": seen.gram,
        "amax": torch.tensor(seen.amax),
    }


def _process(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    shard = Shard(rank, world, rank)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    save_file(_learn(shard), Path(folder) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (2, port, str(tmp_path)), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = _learn(Shard())
    assert float(alone["errors"][1]) < 0.999 * float(alone["errors"][0])
    assert torch.allclose(first["errors"], alone["errors"], rtol=1e-4)
    assert float((first["codes"] != alone["codes"]).float().mean()) < 1e-3
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
