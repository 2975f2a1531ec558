"""Pages of mapped weights leave the memory and nothing is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from exporter.gpu import available_memory
from exporter.memory import release_mapped_weights, usable_memory

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


def test_a_containers_limit_counts_where_it_is_lower(tmp_path: Path) -> None:
    assert usable_memory(tmp_path) > 1 << 28
    (tmp_path / "memory.current").write_text("1000\n")
    for limit, usable in {"5000\n": 4000, "10\n": 0}.items():
        (tmp_path / "memory.max").write_text(limit)
        assert usable_memory(tmp_path) == usable
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_memory(tmp_path) > (available_memory() or 0) / 2
