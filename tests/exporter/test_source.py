"""What is checked before an export takes long."""

from __future__ import annotations

import pytest

from exporter.errors import EnvironmentLacksError
from exporter.models.config import PixArtConfig
from exporter.recipe import CalibrationSection
from exporter.source import check_memory, installed_memory

PIXART = PixArtConfig(sample_size=64, caption_channels=4096, cross_attention_dim=1152)
SHAPE = (4, 64, 64)


def test_too_many_trajectories_are_refused_with_the_number_that_fits() -> None:
    settings = CalibrationSection(prompts="x", samples=64)
    per_trajectory = 5 * 40 * 1024 * 1152 * 4
    with pytest.raises(EnvironmentLacksError, match="at most 10 fit") as caught:
        check_memory(settings, PIXART, SHAPE, 10 * per_trajectory + 1)
    assert "60 GB" in str(caught.value)
    check_memory(settings, PIXART, SHAPE, 64 * per_trajectory)


def test_without_guidance_half_of_it_is_needed() -> None:
    settings = CalibrationSection(prompts="x", samples=20, guidance=1.0)
    per_trajectory = 5 * 20 * 1024 * 1152 * 4
    check_memory(settings, PIXART, SHAPE, 20 * per_trajectory)
    with pytest.raises(EnvironmentLacksError, match="at most 19 fit"):
        check_memory(settings, PIXART, SHAPE, 20 * per_trajectory - 1)


def test_this_machine_has_memory() -> None:
    assert installed_memory() > 1 << 28
