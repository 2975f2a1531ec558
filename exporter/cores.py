"""Layer after layer on every core: what a layer takes are operations too small to be shared out among threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch's operations on one core: threads would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_every_core(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`work` of each item, in order and without gradients: as many items at once as torch uses threads, one each."""

    def alone(item: _Item) -> _Result:
        with one_thread(), torch.no_grad():
            return work(item)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(alone, items)
