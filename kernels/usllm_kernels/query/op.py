"""Query: states -> decoded weight."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm import sketch
from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.dispatch import choose


def query(states: States, plan: Plan, dtype: torch.dtype = torch.float32, *, backend: str | None = None) -> Tensor:
    """Decoded weight [out, in], as :func:`usllm.sketch.query` gives it, bit for bit; rounded to ``dtype``.

    Args:
        states: Of the plan.
        plan: The layer's plan.
        dtype: float32, bfloat16 or float16.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: The backend cannot run.
    """
    if choose(states["codes"].device, backend) == "numba":
        from usllm_kernels.cpu import codec

        return codec.query(states, plan, dtype)
    return sketch.query(states, plan).to(dtype)
