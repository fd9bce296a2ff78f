"""Threads for the parts of one layer, where the layers themselves run one after another.

They are torch's own where those are at hand: threads beside them would have to share their cores. Else they are a
pool's, which have to be woken.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from usllm_kernels.cpu.team import CALLBACK, Team, team_of_torch

T = TypeVar("T")

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


class Pool:
    """Python's threads, asked as a :class:`~usllm_kernels.cpu.team.Team` is."""

    _WAKING = 8
    """How much larger work has to be than what a team shares."""

    def threads(self, size: int, least: int) -> int:
        """As many as torch uses in this one, for work that is large enough."""
        return torch.get_num_threads() if size >= least * self._WAKING else 1

    def run(self, part: Callable[[], Any], numbers: Iterable[int], threads: int) -> None:
        """Do a job on some threads, each of which does its part."""
        others, compiled = tuple(numbers), part()
        function = CALLBACK(compiled.address)
        jobs = [array("q", (0, number, threads, *others)) for number in range(threads)]
        self.call(lambda job: function(job.buffer_info()[0]), jobs, threads)

    def call(self, work: Callable[[T], object], tasks: Sequence[T], threads: int) -> None:
        """Do ``work`` on every task."""
        if threads < 2:
            for task in tasks:
                work(task)
            return
        key = os.getpid(), threads  # the threads of a pool do not survive a fork
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix="usllm")
        list(_pools[key].map(work, tasks))


_POOL = Pool()


def workers() -> Team | Pool:
    """Who does parts of a job."""
    return team_of_torch() or _POOL


def side_by_side(work: Callable[[T], object], tasks: Sequence[T]) -> None:
    """``work`` on every task, on as many threads as torch uses in this one; the tasks write to different places."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads < 2:
        for task in tasks:
            work(task)
    else:
        workers().call(work, tasks, threads)
