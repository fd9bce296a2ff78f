"""Which back ends can be tested in this process."""

from __future__ import annotations

import torch

from usllm_kernels.dispatch import installed, interpreted


def unusable(backend: str) -> str | None:
    """Why a backend cannot be tested in this process."""
    if backend != "torch" and not installed(backend):
        return f"{backend} is not installed"
    if backend == "triton" and not (torch.cuda.is_available() or interpreted()):
        return "no CUDA; tests/kernels/test_interpreted.py runs this in Triton's interpreter"
    return None
