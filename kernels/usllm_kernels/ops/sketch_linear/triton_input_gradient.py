"""Gradient of the input on CUDA for one tile of tokens: ``dy Ŵ`` from tiles of the decoded weight."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Annotations mean something else to Triton.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.launch import dot_in_float32, groups_argument, power_of_two, sketch_argument
from usllm_kernels.triton_tile import as_multiplied, decoded_tile


@triton.jit
def input_gradient_kernel(
    gradient,  # [tokens, out]
    total_in,  # float32 [tokens, channels with states], read and written: spans are added up one after another
    tokens,
    outputs,
    groups,
    sketch,
    span,
    FIRST_SPAN: tl.constexpr,
    FLOAT32: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    active_index = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    place = total_in + token[:, None] * sketch.num_active + active_index[None, :]
    kept = (token < tokens)[:, None] & (active_index < sketch.num_active)[None, :]
    if FIRST_SPAN:
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    else:
        total = tl.load(place, mask=kept, other=0.0)
    tiles = tl.cdiv(span.n, OUTPUTS)
    for tile in range(groups * tiles):
        group = tile // tiles
        i = tile % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
        weight = decoded_tile(sketch, span, active_index, i, group)  # [CHANNELS, OUTPUTS]
        live = (token < tokens)[:, None] & (i < span.n)[None, :]
        output = span.start + group * span.n + i
        value = tl.load(gradient + token[:, None] * outputs + output[None, :], mask=live, other=0.0)
        if FLOAT32:
            weight = as_multiplied(weight, gradient.dtype.element_ty)
            total += tl.dot(value.to(tl.float32), tl.trans(weight), input_precision="ieee")
        else:
            total += tl.dot(value, tl.trans(weight.to(value.dtype)))
    tl.store(place, total, mask=kept)


def few_tokens_gradient(gradient: Tensor, states: States, plan: Plan, tile: int) -> Tensor:
    """``dy Ŵ`` of the channels with states, float32 [tokens, channels with states].

    Args:
        gradient: [tokens, out], contiguous.
        states: Of the plan.
        plan: A plan with states.
        tile: The most tokens that decode once.
    """
    tokens, outputs = gradient.shape
    known, sketch = sketch_argument(states, plan)
    total = torch.empty(tokens, plan.num_active, dtype=torch.float32, device=gradient.device)
    rows, channels = power_of_two(tokens, 16, tile), power_of_two(plan.num_active, 16, 32)
    for span_index, span in enumerate(known.spans):
        input_gradient_kernel[triton.cdiv(tokens, rows), triton.cdiv(plan.num_active, channels)](
            gradient,
            total,
            tokens,
            outputs,
            span.groups,
            sketch,
            groups_argument(span),
            FIRST_SPAN=span_index == 0,
            FLOAT32=dot_in_float32() or gradient.dtype not in (torch.bfloat16, torch.float16),
            TOKENS=rows,
            CHANNELS=channels,
            OUTPUTS=power_of_two(span.size, 16, 32),
            num_warps=4,
        )
    return total
