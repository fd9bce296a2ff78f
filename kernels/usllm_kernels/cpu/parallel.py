"""Threads for the groups of one layer, where the layers themselves run one after another."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def side_by_side(work: Callable[[T], None], tasks: Sequence[T]) -> None:
    """``work`` on every task, on as many threads as torch uses in this one; the tasks write to different places."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads < 2:
        for task in tasks:
            work(task)
        return
    key = os.getpid(), threads  # the threads of a pool do not survive a fork
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix="usllm")
    list(_pools[key].map(work, tasks))
