"""What is checked before an export takes long."""

from __future__ import annotations

import pytest

from exporter.errors import EnvironmentLacksError
from exporter.recipe import CalibrationSection
from exporter.source import check_memory, installed_memory

# PixArt at 512 x 512 pixels.
BLOCK_OUTPUT = 1024 * 1152


def test_too_many_trajectories_are_refused_with_the_number_that_fits() -> None:
    settings = CalibrationSection(prompts="x", samples=64)
    per_trajectory = 5 * 40 * 1024 * 1152 * 4
    with pytest.raises(EnvironmentLacksError, match="at most 10 fit") as caught:
        check_memory(settings, BLOCK_OUTPUT, 0, 10 * per_trajectory + 1)
    assert "60 GB" in str(caught.value)
    check_memory(settings, BLOCK_OUTPUT, 0, 64 * per_trajectory)


def test_without_guidance_half_of_it_is_needed() -> None:
    settings = CalibrationSection(prompts="x", samples=20, guidance=1.0)
    per_trajectory = 5 * 20 * 1024 * 1152 * 4
    check_memory(settings, BLOCK_OUTPUT, 0, 20 * per_trajectory)
    with pytest.raises(EnvironmentLacksError, match="at most 19 fit"):
        check_memory(settings, BLOCK_OUTPUT, 0, 20 * per_trajectory - 1)


def test_this_machine_has_memory() -> None:
    assert installed_memory() > 1 << 28
