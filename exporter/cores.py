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

    def without_gradients(item: _Item) -> _Result:
        with torch.no_grad():
            return work(item)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(without_gradients, items)
    finally:
        # What one thread sets is also what threads begin with later.
        torch.set_num_threads(threads)
