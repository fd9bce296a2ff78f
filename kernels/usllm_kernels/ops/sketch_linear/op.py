"""``y = x Ŵᵀ`` straight from the states; the backward pass decodes again instead of keeping the decoded weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.dispatch import implementation, running_on, traced
from usllm_kernels.plans import PlanNumbers, check_states, flatten, list_states, name_states, unflatten

SLAB = 1 << 25
"""Weights that a card decodes at a time for many tokens: 64 MiB in bfloat16."""


def sketch_linear(
    x: Tensor,
    states: States,
    plan: Plan,
    bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Map [..., in] to [..., out] with the decoded weight, in the dtype of ``x`` or of autocast.

    The backward pass saves ``x`` and the states, and decodes again.

    Args:
        x: [..., in].
        states: Of the plan; ``codes`` may be the packed stream, uint8 (:func:`usllm_kernels.packed_states`).
        plan: The layer's plan.
        bias: [out], or none.
        weight: The latent weight [out, in], for training: its gradient is that of the decoded weight
            (straight-through). Its values are not read.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: ``x`` is not [..., in], the back end cannot run, or the states are not the plan's.
    """
    if x.shape[-1] != plan.shape[1]:
        raise ValueError(f"{plan.name}: the input has {x.shape[-1]} channels, the plan {plan.shape[1]}")
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x, with_gradient = x.to(dtype), torch.is_grad_enabled() and (x.requires_grad or _needs_gradient(weight))
    if not with_gradient and not traced(x):
        y = _product(x, states, plan, backend)  # of one token, the custom op takes as long as the product
    else:
        arguments = list_states(states), *flatten(plan), backend or ""
        y = _SketchLinear.apply(x, weight, *arguments) if with_gradient else sketch_linear_op(x, *arguments)
    return y if bias is None else y + bias.to(dtype)


def _needs_gradient(weight: Tensor | None) -> bool:
    return weight is not None and weight.requires_grad


def _product(x: Tensor, states: States, plan: Plan, backend: str | None) -> Tensor:
    check_states(states, plan)
    if states["codes"].device != x.device:
        raise ValueError(f"{plan.name}: states are on {states['codes'].device}, the input on {x.device}")
    with running_on(x.device):
        computing = implementation("sketch_linear", plan, x.device, backend)
        y: Tensor = computing.sketch_linear(x.reshape(-1, plan.shape[1]), states, plan)
    return y.view(*x.shape[:-1], plan.shape[0])


@torch.library.custom_op("usllm::sketch_linear", mutates_args=())
def sketch_linear_op(
    x: Tensor,
    states: list[Tensor],
    plan: list[Tensor],
    numbers: list[int],
    backend: str,
) -> Tensor:
    """``x Ŵᵀ``; see :mod:`usllm_kernels.plans`."""
    return _product(x, name_states(states), unflatten(plan, numbers), backend)


@torch.library.custom_op("usllm::sketch_linear_input_gradient", mutates_args=())
def input_gradient_op(
    gradient: Tensor,
    states: list[Tensor],
    plan: list[Tensor],
    numbers: list[int],
    backend: str,
) -> Tensor:
    """``dy Ŵ``; see :mod:`usllm_kernels.plans`."""
    of, named = unflatten(plan, numbers), name_states(states)
    check_states(named, of)
    with running_on(gradient.device):
        computing = implementation("sketch_linear", of, gradient.device, backend)
        found: Tensor = computing.input_gradient(gradient.reshape(-1, of.shape[0]), named, of)
    return found.view(*gradient.shape[:-1], of.shape[1])


@sketch_linear_op.register_fake
def _(x: Tensor, states: Any, plan: Any, numbers: list[int], backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], PlanNumbers(*numbers).out_features)


@input_gradient_op.register_fake
def _(gradient: Tensor, states: Any, plan: Any, numbers: list[int], backend: str) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], PlanNumbers(*numbers).in_features)


class _SketchLinear(torch.autograd.Function):
    """``x Ŵᵀ`` with its gradients.

    Not registered with the custom op: torch would take the lists among its arguments apart at every call, which takes a
    tenth of a small layer's time.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, states: list[Tensor], plan: list[Tensor], numbers: list[int], backend: str
    ) -> Tensor:
        y: Tensor = sketch_linear_op(x, states, plan, numbers, backend)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, states, plan, ctx.numbers, ctx.backend = inputs
        ctx.state_tensors = len(states)
        ctx.latent_dtype = None if weight is None else weight.dtype
        ctx.save_for_backward(x if weight is not None else None, *states, *plan)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        states, plan = tensors[: ctx.state_tensors], tensors[ctx.state_tensors :]
        to_input = to_weight = None
        if ctx.needs_input_grad[0]:
            to_input = input_gradient_op(gradient, states, plan, ctx.numbers, ctx.backend)
        if ctx.needs_input_grad[1]:
            rows = gradient.reshape(-1, gradient.shape[-1])
            to_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(ctx.latent_dtype)
        return to_input, to_weight, None, None, None, None
