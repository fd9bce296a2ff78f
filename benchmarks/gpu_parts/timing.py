"""Seconds of work on a card or on the CPU: medians, behind a first call that compiles, with nothing left in a cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_parts.session import is_lost

Work = Callable[[int], object]
"""Called with 0 … rounds - 1, the copy of its operands that it takes: no cache holds what it reads."""


class Timed(NamedTuple):
    """What a call took.

    Attributes:
        seconds: Median.
        in_graph: Whether inside a CUDA graph, where no launch is waited for.
        why_not: The error that kept it out of one; empty where there was none.
    """

    seconds: float
    in_graph: bool
    why_not: str = ""


@dataclass(frozen=True)
class Clock:
    """How time is taken on one device.

    Attributes:
        device: Where the work is done.
        repeat: Measurements that the median is of.
        copy_bytes: Of the copy that bandwidth is measured by; no cache holds it.
        uncached_bytes: Of all copies of an operand together, so that none waits in a cache.
    """

    device: torch.device
    repeat: int
    copy_bytes: int
    uncached_bytes: int

    @classmethod
    def of(cls, dry_run: bool) -> Clock:
        """The clock of a run."""
        if dry_run:
            return cls(torch.device("cpu"), repeat=1, copy_bytes=1 << 16, uncached_bytes=1)
        return cls(torch.device("cuda"), repeat=9, copy_bytes=1 << 30, uncached_bytes=1 << 28)

    def seconds(self, work: Work, rounds: int = 1) -> float:
        """Median seconds of one call, launched as it comes."""
        return self._median(lambda: [work(which) for which in range(rounds)], rounds)

    def seconds_in_graph(self, work: Work, rounds: int = 1) -> float:
        """Median seconds of one call inside a CUDA graph, where no launch is waited for; on the CPU as it comes."""
        if self.device.type != "cuda":
            return self.seconds(work, rounds)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles and allocates outside of the graph
            for which in range(rounds):
                work(which)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [work(which) for which in range(rounds)]
        try:
            return self._median(graph.replay, rounds)
        finally:
            del kept, graph

    def in_graph_if_possible(self, work: Work, rounds: int = 1) -> Timed:
        """One call inside a CUDA graph; launched as it comes where it cannot be captured, or on the CPU."""
        if self.device.type != "cuda":
            return Timed(self.seconds(work, rounds), False)
        try:
            return Timed(self.seconds_in_graph(work, rounds), True)
        except Exception as error:
            if is_lost(error) and "captur" not in str(error):
                raise
            torch.cuda.synchronize()
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            return Timed(self.seconds(work, rounds), False, why)

    def bandwidth(self) -> float:
        """Bytes read and written in a second by a copy."""
        source = torch.rand(self.copy_bytes // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * self.copy_bytes / self.seconds(lambda _: target.copy_(source))

    def copies(self, tensor: Tensor, most: int = 64) -> list[Tensor]:
        """As many copies of an operand as no cache holds: a model's layers do not wait in one either."""
        size = max(tensor.numel() * tensor.element_size(), 1)
        return [tensor.clone() for _ in range(min(-(-self.uncached_bytes // size), most))]

    def _median(self, work: Callable[[], object], rounds: int) -> float:
        found = []
        for number in range(self.repeat + 1):
            elapsed = self._once(work)
            if number:  # the first one compiles and allocates
                found.append(elapsed / rounds)
        return statistics.median(found)

    def _once(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3
