"""``y = x Ŵᵀ`` straight from the states; backward makes the decoded weight again instead of keeping it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.dispatch import choose, running_on
from usllm_kernels.ops.sketch_linear import reference
from usllm_kernels.plans import check_states, flatten, list_states, name_states, unflatten


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

    Nothing of the decoded weight is kept for the backward pass: it saves ``x`` and the states, and decodes anew.

    Args:
        x: [..., in].
        states: Of the plan; ``codes`` may be the packed stream, uint8 (:func:`usllm_kernels.packed_states`).
        plan: The layer's plan.
        bias: [out], or none.
        weight: The latent weight [out, in], for training: its gradient is that of the decoded weight
            (straight-through). Its values are not read.
        backend: See :func:`usllm_kernels.dispatch.choose`.

    Raises:
        ValueError: ``x`` is not [..., in], or the backend cannot run.
    """
    if x.shape[-1] != plan.shape[1]:
        raise ValueError(f"{plan.name}: the input has {x.shape[-1]} channels, the plan {plan.shape[1]}")
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    y: Tensor = sketch_linear_op(x.to(dtype), weight, *list_states(states), *flatten(plan), backend or "")
    return y if bias is None else y + bias.to(dtype)


@torch.library.custom_op("usllm::sketch_linear", mutates_args=())
def sketch_linear_op(
    x: Tensor,
    weight: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    scale_base: Tensor,
    output_scales: Tensor,
    output_scale_base: Tensor,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
    backend: str,
) -> Tensor:
    """``x Ŵᵀ``; see :mod:`usllm_kernels.plans`."""
    plan = unflatten(classes, channel_class, numbers)
    states = name_states((codes, scales, scale_base, output_scales, output_scale_base))
    check_states(states, plan)
    tokens = x.reshape(-1, plan.shape[1])
    with running_on(x.device):
        y: Tensor = _backend(x.device, backend).sketch_linear(tokens, states, plan)
    return y.view(*x.shape[:-1], plan.shape[0])


@torch.library.custom_op("usllm::sketch_linear_input_gradient", mutates_args=())
def input_gradient_op(
    gradient: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_base: Tensor,
    output_scales: Tensor,
    output_scale_base: Tensor,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
    backend: str,
) -> Tensor:
    """``dy Ŵ``; see :mod:`usllm_kernels.plans`."""
    plan = unflatten(classes, channel_class, numbers)
    states = name_states((codes, scales, scale_base, output_scales, output_scale_base))
    check_states(states, plan)
    tokens = gradient.reshape(-1, plan.shape[0])
    with running_on(gradient.device):
        found: Tensor = _backend(gradient.device, backend).input_gradient(tokens, states, plan)
    return found.view(*gradient.shape[:-1], plan.shape[1])


def _backend(device: torch.device, backend: str) -> Any:
    chosen = choose(device, backend)
    if chosen == "numba":
        from usllm_kernels.cpu import linear

        return linear
    if chosen == "triton":
        from usllm_kernels.ops.sketch_linear import triton

        return triton
    return reference


@sketch_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    scale_base: Tensor,
    output_scales: Tensor,
    output_scale_base: Tensor,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
    backend: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], numbers[0])


@input_gradient_op.register_fake
def _(
    gradient: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_base: Tensor,
    output_scales: Tensor,
    output_scale_base: Tensor,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
    backend: str,
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], numbers[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *tensors, numbers, backend = inputs
    ctx.numbers, ctx.backend = numbers, backend
    ctx.latent_dtype = None if weight is None else weight.dtype
    ctx.save_for_backward(x if weight is not None else None, *tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    to_input = to_weight = None
    if ctx.needs_input_grad[0]:
        to_input = input_gradient_op(gradient, *tensors, ctx.numbers, ctx.backend)
    if ctx.needs_input_grad[1]:
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(ctx.latent_dtype)
    return to_input, to_weight, *[None] * 9


sketch_linear_op.register_autograd(_backward, setup_context=_save)
