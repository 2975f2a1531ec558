"""Work on layers, shared out among the cores."""

from __future__ import annotations

import torch

from exporter.cores import on_every_core, one_thread


def test_results_come_in_order_without_gradients_and_on_one_thread_each() -> None:
    weight = torch.ones(3, requires_grad=True)

    def doubled(factor: int) -> tuple[float, bool, int]:
        result = weight * factor
        return float(result[0].detach()), result.requires_grad, torch.get_num_threads()

    before = torch.get_num_threads()
    assert list(on_every_core(doubled, range(20))) == [(float(factor), False, 1) for factor in range(20)]
    assert torch.get_num_threads() == before


def test_one_thread_ends_with_its_block() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
