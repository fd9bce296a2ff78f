"""Folded products: outputs are spread from buckets, or summed up by bucket, and the product is with the states.

For operators that are linear in the states, under a hash that all channels share (``sketch.hash=shared``),
``y_i = Σ_c x_c Σ_r S_r[c, bucket_r(i)] = Σ_r (Σ_c x_c S_r[c, ·])[bucket_r(i)]``: one product with the states, R * K / G
the size of the dense one, and a gather of its results. Turned, ``dx`` sums ``dy`` by bucket first. A rotation of its
own for every channel asks for one such gather per rotation and class, n * rows additions for each output of a group:
with c classes, more than the dense product has wherever the layer has fewer than n * c * rows channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usllm.sketch import Plan, channel_scales
from usllm.sketch.codec import States
from usllm_kernels.ops.query.reference import unpacked
from usllm_kernels.plans import check_states, flatten, list_states, name_states, unflatten


def folds(plan: Plan) -> bool:
    """Whether products with this plan's sketch can be folded."""
    return plan.operator.linear and not plan.turns and not plan.config.output_scale


def folded_linear(x: Tensor, states: States, plan: Plan, bias: Tensor | None = None) -> Tensor:
    """``x Ŵᵀ + b``, [..., out], in the dtype of ``x`` or of autocast, with fewer operations than the dense product.

    Args:
        x: [..., in].
        states: Of the plan; ``codes`` may be the packed stream, uint8.
        plan: A plan that :func:`folds`.
        bias: [out], or none.

    Raises:
        ValueError: The plan's products cannot be folded.
    """
    if not folds(plan):
        config = plan.config
        raise ValueError(
            f"{plan.name}: products fold for operator=mean with hash=shared and no output_scale, not for operator="
            f"{config.operator}, hash={config.hash}, output_scale={config.output_scale}; use sketch_linear"
        )
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    y: Tensor = folded_linear_op(x.to(dtype), *list_states(states), *flatten(plan))
    return y if bias is None else y + bias.to(dtype)


@torch.library.custom_op("usllm::folded_linear", mutates_args=())
def folded_linear_op(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_base: Tensor,
    output_scales: Tensor,
    output_scale_base: Tensor,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
) -> Tensor:
    """``x Ŵᵀ``; see :mod:`usllm_kernels.plans`."""
    plan = unflatten(classes, channel_class, numbers)
    tokens, device = x.reshape(-1, plan.shape[1]), x.device
    out = torch.zeros(len(tokens), plan.shape[0], device=device)
    states = name_states((codes, scales, scale_base, output_scales, output_scale_base))
    check_states(states, plan)
    for number, index, matrix in _matrices(states, plan, x.dtype):
        span, block = plan.spans[number], plan.blocks[index]
        rows = slice(span.start, span.start + span.groups * span.size)
        by_bucket = (tokens.index_select(1, block.channels.to(device)) @ matrix).float()
        by_bucket = by_bucket.view(len(tokens), span.groups, block.choice.rows, -1)
        for row, bucket in enumerate(_buckets(plan, number, index).to(device)):
            out[:, rows] += by_bucket[:, :, row].index_select(2, bucket).flatten(1)
    return out.to(x.dtype).view(*x.shape[:-1], plan.shape[0])


@torch.library.custom_op("usllm::folded_linear_input_gradient", mutates_args=())
def folded_input_gradient_op(
    gradient: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_base: Tensor,
    output_scales: Tensor,
    output_scale_base: Tensor,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
) -> Tensor:
    """``dy Ŵ``; see :mod:`usllm_kernels.plans`."""
    plan = unflatten(classes, channel_class, numbers)
    tokens, device = gradient.reshape(-1, plan.shape[0]), gradient.device
    found = torch.zeros(len(tokens), plan.shape[1], device=device)
    states = name_states((codes, scales, scale_base, output_scales, output_scale_base))
    check_states(states, plan)
    for number, index, matrix in _matrices(states, plan, gradient.dtype):
        span, block = plan.spans[number], plan.blocks[index]
        rows = tokens[:, span.start : span.start + span.groups * span.size].float()
        of_groups = torch.nn.functional.pad(rows.reshape(-1, span.groups, span.size), (0, 1))
        # A balanced bucket's members, one short at most: a gather and a sum in a fixed order, no scattering.
        slots = plan.placement(block.choice, span.size).slots.long()
        members = torch.where(slots < span.size, (slots + plan.rotation(span)) % span.size, span.size).to(device)
        summed = of_groups[:, :, members].sum(3)  # [tokens, groups, rows, K]
        part = (summed.flatten(1).to(gradient.dtype) @ matrix.t()).float()
        found.index_add_(1, block.channels.to(device), part)
    return found.to(gradient.dtype).view(*gradient.shape[:-1], plan.shape[1])


@folded_linear_op.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_base: Tensor,
    output_scales: Tensor,
    output_scale_base: Tensor,
    classes: Tensor,
    channel_class: Tensor,
    numbers: list[int],
) -> Tensor:
    return x.new_empty(*x.shape[:-1], numbers[0])


@folded_input_gradient_op.register_fake
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
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], numbers[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.numbers = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return folded_input_gradient_op(gradient, *ctx.saved_tensors, ctx.numbers), *[None] * 8


folded_linear_op.register_autograd(_backward, setup_context=_save)


def _matrices(states: States, plan: Plan, dtype: torch.dtype) -> list[tuple[int, int, Tensor]]:
    """By span and class: their numbers, and the states as weights [channels, groups * rows * K]."""
    codes = states["codes"]
    if codes.dtype == torch.uint8:
        codes = unpacked(codes, plan)
        states = {**states, "codes": codes}
    scale = channel_scales(states, plan)
    found = []
    for index, block in enumerate(plan.blocks):
        choice = block.choice
        held = codes[block.first_state : block.first_state + block.num_states].view(len(block.channels), -1)
        weights = held * scale[block.channels.to(scale.device), None]
        sizes = [span.groups * choice.rows * min(choice.states, span.size) for span in plan.spans]
        found += [(number, index, part.to(dtype)) for number, part in enumerate(weights.split(sizes, 1))]
    return found


def _buckets(plan: Plan, number: int, block: int) -> Tensor:
    """Bucket of each output of a group, int64 [rows, n]."""
    span = plan.spans[number]
    positions = (torch.arange(span.size) - plan.rotation(span)) % span.size
    return plan.placement(plan.blocks[block].choice, span.size).buckets[:, positions].long()
