"""How long work takes on the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Work = Callable[[], object]
_WARM_UPS = 3
_LEAST_FLUSHED = 256 * 2**20


class Clock:
    """CUDA events around one replay of a captured graph, caches overwritten before each; medians of `rounds`.

    Work is captured, so that what is timed is the GPU's time and not that of launching from Python. While the GPU
    overwrites its L2, the host has put events and graph on the stream.
    """

    def __init__(self, device: torch.device, rounds: int) -> None:
        self._rounds = rounds
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, _LEAST_FLUSHED)
        self._flushed = torch.empty(size, dtype=torch.int8, device=device)

    def milliseconds(self, candidates: Mapping[str, Work]) -> dict[str, float]:
        """The median of each, all of them in turn in every round, so that clocks and heat are the same for all."""
        graphs = {name: captured(work) for name, work in candidates.items()}
        times: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
        for _ in range(self._rounds):
            for name, graph in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flushed.zero_()
                start.record()
                graph.replay()
                end.record()
                times[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: statistics.median(start.elapsed_time(end) for start, end in events) for name, events in times.items()
        }

    def least(self) -> float:
        """The median of a kernel that does next to nothing."""
        one = torch.ones(1, device=self._flushed.device)
        return self.milliseconds({"zero": one.zero_})["zero"]

    def launched_milliseconds(self, work: Work) -> float:
        """The median of work that Python launches, its launches included."""
        work()
        times = []
        for _ in range(self._rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(float(start.elapsed_time(end)))
        return statistics.median(times)

    def copy_bandwidth(self) -> float:
        """Bytes a millisecond of a device copy, those read and those written."""
        source = torch.empty_like(self._flushed).random_()
        target = torch.empty_like(source)

        def copy() -> Tensor:
            return target.copy_(source)

        return 2 * source.nbytes / self.milliseconds({"copy": copy})["copy"]


def captured(work: Work) -> torch.cuda.CUDAGraph:
    """The work as a graph, after it ran a few times by itself, which compiles and loads what it needs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
