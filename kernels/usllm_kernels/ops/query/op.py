"""Query: states -> decoded weight."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.dispatch import choose, running_on
from usllm_kernels.ops.query import reference
from usllm_kernels.plans import check_states, flatten, list_states, name_states, unflatten


def query(states: States, plan: Plan, dtype: torch.dtype = torch.float32, *, backend: str | None = None) -> Tensor:
    """Decoded weight [out, in], as :func:`usllm.sketch.query` gives it, bit for bit; rounded to ``dtype``.

    Args:
        states: Of the plan; ``codes`` may be the packed stream, uint8 (:func:`usllm_kernels.packed_states`).
        plan: The layer's plan.
        dtype: float32, bfloat16 or float16.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: The backend cannot run.
    """
    result: Tensor = query_op(*list_states(states), *flatten(plan), dtype, backend or "")
    return result


@torch.library.custom_op("usllm::query", mutates_args=())
def query_op(
    codes: Tensor,
    scales: Tensor,
    scale_base: Tensor,
    output_scales: Tensor,
    output_scale_base: Tensor,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The decoded weight; see :mod:`usllm_kernels.plans`."""
    plan = unflatten(classes, channel_class, numbers)
    states = name_states((codes, scales, scale_base, output_scales, output_scale_base))
    check_states(states, plan)
    chosen = choose(codes.device, backend)
    if chosen == "numba":
        from usllm_kernels.cpu import codec

        return codec.query(states, plan, dtype)
    if chosen == "triton":
        from usllm_kernels.ops.query import triton

        with running_on(codes.device):
            return triton.query(states, plan, dtype)
    return reference.query(states, plan, dtype)


@query_op.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    scale_base: Tensor,
    output_scales: Tensor,
    output_scale_base: Tensor,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return torch.empty(numbers[0], numbers[1], dtype=dtype, device=codes.device)
