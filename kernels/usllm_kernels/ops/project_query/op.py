"""Projection and query in one: latent weight -> states and decoded weight, for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States, check_shape
from usllm_kernels.dispatch import choose, running_on
from usllm_kernels.ops.project_query import reference
from usllm_kernels.plans import empty, fake_states, flatten, list_states, name_states, unflatten

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def project_query(
    weight: Tensor,
    plan: Plan,
    moment: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    winners: Tensor | None = None,
    sums: Tensor | None = None,
    backend: str | None = None,
) -> tuple[States, Tensor]:
    """States of a latent weight, and the weight that they decode to [out, in].

    The gradient of the decoded weight goes to the latent one as it is (straight-through).

    Args:
        weight: [out, in], any float dtype; computed in fp32.
        plan: The layer's plan.
        moment: E[a²] per input channel, [in]: weights the fit of the output scale, if the plan has one.
        dtype: Of the decoded weight: float32, bfloat16 or float16.
        winners: As for :func:`usllm_kernels.ops.project`.
        sums: fp32 [2, in], written: over the outputs, the squared error of the decoded weight, and the squared weight.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: The weight's shape is not the plan's, or the backend cannot run.
    """
    check_shape(weight, plan)
    wanted = winners is not None, sums is not None
    decoded, *states, kept, found = project_query_op(weight, moment, *flatten(plan), dtype, *wanted, backend or "")
    if winners is not None:
        winners.copy_(kept)
    if sums is not None:
        sums.copy_(found)
    return name_states(states), decoded


@torch.library.custom_op("usllm::project_query", mutates_args=())
def project_query_op(
    weight: Tensor,
    moment: Tensor | None,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
    dtype: torch.dtype,
    winners: bool,
    sums: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decoded weight, codes, scales, their base, output scales, their base, winners, sums."""
    plan, device = unflatten(classes, channel_class, numbers), weight.device
    chosen = choose(device, backend)
    kept = torch.empty(plan.num_states, dtype=torch.int16, device=device) if winners else None
    found = torch.empty(2, plan.shape[1], device=device) if sums else None
    arguments = plan, moment, dtype, kept, found
    if chosen == "numba":
        from usllm_kernels.cpu import codec

        states, decoded = codec.project_query(weight.float(), *arguments)
    elif chosen == "triton":
        from usllm_kernels.ops.project_query import triton

        with running_on(device):
            states, decoded = triton.project_query(weight, *arguments)
    else:
        states, decoded = reference.project_query(weight, *arguments)
    return (
        decoded,
        *list_states(states),
        empty(torch.int16, device) if kept is None else kept,
        empty(torch.float32, device) if found is None else found,
    )


@project_query_op.register_fake
def _(
    weight: Tensor,
    moment: Tensor | None,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
    dtype: torch.dtype,
    winners: bool,
    sums: bool,
    backend: str,
) -> _Outputs:
    device = weight.device
    kept = torch.empty(numbers[2] if winners else 0, dtype=torch.int16, device=device)
    found = torch.empty((2, numbers[1]) if sums else (0,), device=device)
    decoded = torch.empty(numbers[0], numbers[1], dtype=dtype, device=device)
    return decoded, *fake_states(numbers, device), kept, found


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.dtype = inputs[0].dtype


def _straight_through(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return None if gradient is None else gradient.to(ctx.dtype), *[None] * 8


project_query_op.register_autograd(_straight_through, setup_context=_remember)
