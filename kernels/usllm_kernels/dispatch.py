"""The one place that decides what computes: Triton on CUDA, numba on the CPU, else torch.

``USLLM_KERNELS`` set to ``triton``, ``numba`` or ``torch``, or the argument ``backend`` of an operation, chooses for
itself; a choice that cannot run raises. ``auto``, the default, never does.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

VARIABLE = "USLLM_KERNELS"
BACKENDS = ("auto", "triton", "numba", "torch")


def choose(device: torch.device, backend: str | None = None) -> str:
    """``triton``, ``numba`` or ``torch``: what computes on ``device``.

    Args:
        device: Of the operands.
        backend: One of :data:`BACKENDS`; ``None`` reads ``USLLM_KERNELS``.

    Raises:
        ValueError: The name is unknown, or what it names cannot run here.
    """
    asked = backend or os.environ.get(VARIABLE) or "auto"
    source = f"backend={asked!r}" if backend else f"{VARIABLE}={asked}"
    if asked not in BACKENDS:
        raise ValueError(f"{source} is unknown: choose one of {', '.join(BACKENDS)}")
    if asked == "auto":
        if device.type == "cuda":
            return "triton" if installed("triton") else "torch"
        return "numba" if device.type == "cpu" and installed("numba") else "torch"
    if asked == "numba" and device.type != "cpu":
        raise ValueError(f"{source} computes on the CPU only, the tensors are on {device.type}: leave it at auto")
    if asked == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(
            f"{source} needs CUDA tensors, these are on {device.type}: leave it at auto, or set TRITON_INTERPRET=1"
            " before the start to have the kernels interpreted, which is slow"
        )
    if asked != "torch" and not installed(asked):
        raise ValueError(f"{source}, but {asked} is not installed: pip install {asked}, or leave the choice at auto")
    return asked


def running_on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device of the operands the one that kernels are launched on; Triton asks for no tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=8)
def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return find_spec(package) is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
