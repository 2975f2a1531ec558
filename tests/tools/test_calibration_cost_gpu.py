"""What is extrapolated from a GPU's times, and how the page shows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from exporter.calibration.placement import CPU, Placement
from tools import calibration_cost_gpu
from tools.calibration_cost_gpu import BLOCKS, Calibrated, Cost, main, section

LEARNED = Calibrated(seconds=9.0, gigabytes=3.5, start=2e-8, end=1e-8)
COST = Cost(BLOCKS[0], iteration=0.08, per_input=0.03, fixed=2.0, calibrated=LEARNED, on_gpu=True)


def test_hours_are_those_of_all_blocks_iterations_and_inputs() -> None:
    assert COST.hours(250) == pytest.approx(28 * (250 * 0.08 + 2560 * 0.03 + 2) / 3600)
    assert replace(COST, fixed=0.0).hours(0) == pytest.approx(28 * 2560 * 0.03 / 3600)
    # Less than four passes, of which an iteration on 16 inputs is three.
    assert replace(COST, per_input=0.006).hours(250) is None


def test_groups_divide_every_block() -> None:
    assert all(block.job.width % 128 == 0 for block in BLOCKS)


def test_activations_stay_on_a_gpu_that_has_room_for_the_whole_models() -> None:
    block, gpu = BLOCKS[0], torch.device("cuda", 0)
    assert block.store(Placement(gpu, 80 * 10**9)).device == gpu
    assert block.store(Placement(gpu, 70 * 10**9)).device == CPU


def test_operations_are_those_of_linears_and_self_attention() -> None:
    block = BLOCKS[0]
    per_token = 2 * (8 * 1152**2 + 2 * 4 * 1152**2) + 4 * 1024 * 1152
    assert block.iteration_flop == 3 * block.job.batch * block.job.tokens * per_token


def test_the_section_shows_times_and_small_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_cost_gpu, "machine", lambda: "GPU")
    text = section([COST], [("PixArt, FP32", LEARNED)])
    assert "| 80.0 ms | 29 | 30.0 ms | 2.0 s | 3.5 GB | 38 GB on the GPU |" in text
    assert "| PixArt, FP32 | 9.00 s | 2.000e-08 | 1.000e-08 |" in text
    assert "Products of float32 numbers" not in section([COST], [])
    unresolved = replace(COST, per_input=0.001, on_gpu=False)
    assert "| not resolved | 2.0 s | 3.5 GB | 38 GB elsewhere | – | – |" in section([unresolved], [])


def test_without_a_gpu_it_says_so() -> None:
    assert CliRunner().invoke(main).exit_code == 3
