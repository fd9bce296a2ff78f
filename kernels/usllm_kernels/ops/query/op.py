"""Query: states -> decoded weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.dispatch import implementation, running_on
from usllm_kernels.plans import check_states, flatten, list_states, name_states, unflatten


def query(states: States, plan: Plan, dtype: torch.dtype = torch.float32, *, backend: str | None = None) -> Tensor:
    """Decoded weight [out, in], as :func:`usllm.sketch.query` gives it, bit for bit; rounded to ``dtype``.

    Args:
        states: Of the plan; ``codes`` may be the packed stream, uint8 (:func:`usllm_kernels.packed_states`).
        plan: The layer's plan.
        dtype: float32, bfloat16 or float16.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: The back end cannot run, or the states are not the plan's.
    """
    result: Tensor = query_op(list_states(states), *flatten(plan), dtype, backend or "")
    return result


@torch.library.custom_op("usllm::query", mutates_args=())
def query_op(states: list[Tensor], plan: list[Tensor], numbers: list[int], dtype: torch.dtype, backend: str) -> Tensor:
    """The decoded weight; see :mod:`usllm_kernels.plans`."""
    of, named, device = unflatten(plan, numbers), name_states(states), states[0].device
    check_states(named, of)
    with running_on(device):
        decoded: Tensor = implementation("query", of, device, backend).query(named, of, dtype)
    return decoded


@query_op.register_fake
def _(states: list[Tensor], plan: Any, numbers: list[int], dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty(numbers[:2], dtype=dtype, device=states[0].device)
