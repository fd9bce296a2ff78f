"""Work on many layers at once on the CPU, one thread a layer.

A layer's sketch is many small operations: splitting each of them over the cores costs more than it gains, whole layers
side by side do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from usllm.compress.layer import CompressedLinear

T = TypeVar("T")


def over_layers(work: Callable[[CompressedLinear], T], layers: Mapping[str, CompressedLinear]) -> dict[str, T]:
    """``work`` on every layer, by name; the layers are independent, so the result does not depend on the threads."""
    threads = torch.get_num_threads()
    on_cpu = all(layer.importance.device.type == "cpu" for layer in layers.values())
    if threads == 1 or not on_cpu or len(layers) < 2:
        return {name: work(layer) for name, layer in layers.items()}
    try:
        # Each worker computes alone; the count is its own, but MKL's is the process's and is set back below.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return dict(zip(layers, pool.map(work, layers.values()), strict=True))
    finally:
        torch.set_num_threads(threads)
