"""Projection and query in one: latent weight -> states and decoded weight, for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States, check_shape
from usllm_kernels.dispatch import implementation, running_on
from usllm_kernels.plans import PlanNumbers, absent, fake_states, flatten, list_states, name_states, unflatten


def project_query(
    weight: Tensor,
    plan: Plan,
    second_moment: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    winners: Tensor | None = None,
    sums: Tensor | None = None,
    output_scale: Tensor | None = None,
    backend: str | None = None,
) -> tuple[States, Tensor]:
    """States of a latent weight, and the weight that they decode to [out, in].

    The gradient of the decoded weight goes to the latent one as it is (straight-through).

    Args:
        weight: [out, in], any float dtype; computed in fp32.
        plan: The layer's plan.
        second_moment: E[a²] per input channel, [in]: weights the fit of the output scale, if the plan has one.
        dtype: Of the decoded weight: float32, bfloat16 or float16.
        winners: As for :func:`usllm_kernels.ops.project`.
        sums: fp32 [2, in], written: over the outputs, the squared error of the decoded weight, and the squared weight.
        output_scale: [out], stored where the plan has an output scale; ``None`` fits it.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: The weight's shape is not the plan's, or the back end cannot run.
    """
    check_shape(weight, plan)
    wanted = winners is not None, sums is not None
    arguments = second_moment, output_scale, *flatten(plan), dtype, *wanted, backend or ""
    if torch.is_grad_enabled() and weight.requires_grad:
        decoded, members, squares, *states = _StraightThrough.apply(weight, *arguments)
    else:
        decoded, states, members, squares = project_query_op(weight, *arguments)
    if winners is not None:
        winners.copy_(members)
    if sums is not None:
        sums.copy_(squares)
    return name_states(states), decoded


@torch.library.custom_op("usllm::project_query", mutates_args=())
def project_query_op(
    weight: Tensor,
    second_moment: Tensor | None,
    output_scale: Tensor | None,
    plan: list[Tensor],
    numbers: list[int],
    dtype: torch.dtype,
    winners: bool,
    sums: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Decoded weight, states, winners and sums; see :mod:`usllm_kernels.plans`."""
    of, device = unflatten(plan, numbers), weight.device
    members = torch.empty(of.num_states, dtype=torch.int16, device=device) if winners else None
    squares = torch.empty(2, of.shape[1], dtype=torch.float32, device=device) if sums else None
    with running_on(device):
        computing = implementation("project_query", of, device, backend)
        states, decoded = computing.project_query(weight, of, second_moment, dtype, members, squares, output_scale)
    return (
        decoded,
        list_states(states),
        absent(torch.int16, device) if members is None else members,
        absent(torch.float32, device) if squares is None else squares,
    )


@project_query_op.register_fake
def _(
    weight: Tensor,
    second_moment: Any,
    output_scale: Any,
    plan: Any,
    numbers: list[int],
    dtype: torch.dtype,
    winners: bool,
    sums: bool,
    backend: str,
) -> Any:
    sizes, device = PlanNumbers(*numbers), weight.device
    return (
        torch.empty(sizes.out_features, sizes.in_features, dtype=dtype, device=device),
        fake_states(numbers, device),
        torch.empty(sizes.num_states if winners else 0, dtype=torch.int16, device=device),
        torch.empty((2, sizes.in_features) if sums else (0,), dtype=torch.float32, device=device),
    )


class _StraightThrough(torch.autograd.Function):
    """The custom op, whose decoded weight hands its gradient to the latent weight.

    Not registered with the custom op, for the reason that :mod:`usllm_kernels.ops.sketch_linear.op` gives.
    """

    @staticmethod
    def forward(weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        decoded, states, members, squares = project_query_op(weight, *arguments)
        return decoded, members, squares, *states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dtype, ctx.others = inputs[0].dtype, len(inputs) - 1
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return gradient.to(ctx.dtype), *[None] * ctx.others
