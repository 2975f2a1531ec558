"""Pages of mapped weights leave the memory and nothing is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from exporter.memory import release_mapped_weights

# Large beside what the process itself needs to read its own mappings, and every sum of ones is exact in float32.
COUNT = 16_000_000
BYTES = 4 * COUNT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mapped pages are told apart by Linux's /proc")


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    save_file({"weight": torch.ones(COUNT)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        return file.get_tensor("weight")


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_pages_that_were_only_read_are_released_and_can_be_read_again(mapped: torch.Tensor) -> None:
    assert float(mapped.sum()) == COUNT
    before = _resident()
    release_mapped_weights()
    assert before - _resident() > BYTES * 0.8
    assert float(mapped.sum()) == COUNT


def test_a_mapping_with_a_changed_page_stays(mapped: torch.Tensor) -> None:
    mapped[5] = 7.0
    assert float(mapped.sum()) == COUNT + 6
    before = _resident()
    release_mapped_weights()
    assert before - _resident() < BYTES * 0.1
    assert float(mapped[5]) == 7.0
