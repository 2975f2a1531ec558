"""Work on layers, shared out among the cores."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier, Thread

import pytest
import torch

from exporter.cores import on_every_core, one_thread

THREADS = 3


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    """Whatever OMP_NUM_THREADS says."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_without_gradients_and_on_one_thread_each() -> None:
    weight = torch.ones(3, requires_grad=True)
    together = Barrier(THREADS, timeout=60)

    def doubled(factor: int) -> tuple[float, bool, int]:
        together.wait()
        result = weight * factor
        return float(result[0].detach()), result.requires_grad, torch.get_num_threads()

    count = 4 * THREADS
    assert list(on_every_core(doubled, range(count))) == [(float(factor), False, 1) for factor in range(count)]


def test_threads_that_begin_later_have_all_cores_again() -> None:
    together = Barrier(THREADS, timeout=60)
    list(on_every_core(lambda _: together.wait(), range(4 * THREADS)))
    found = [torch.get_num_threads()]
    later = Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [THREADS, THREADS]


def test_one_thread_ends_with_its_block() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == THREADS
