"""Products of up to eight tokens on CUDA: each weight is decoded where it is used, once for all tokens.

The channels are split over programs, so that enough programs run; their partial sums are added in a fixed order.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Annotations mean something else to Triton.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.cards import launch_parameters
from usllm_kernels.launch import groups_argument, power_of_two, sketch_argument
from usllm_kernels.triton_tile import as_multiplied, decoded_tile


@triton.jit
def few_tokens_kernel(
    x,  # [tokens, in]
    parts,  # float32 [splits, tokens, out], written
    tokens,
    outputs,
    channels_each,  # of one split, a multiple of CHANNELS
    sketch,
    span,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    tiles = tl.cdiv(span.n, OUTPUTS)
    group = tl.program_id(0) // tiles
    i = tl.program_id(0) % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    last = tl.minimum((split + 1) * channels_each, sketch.num_active)
    for first in range(split * channels_each, last, CHANNELS):
        active_index = first + tl.arange(0, CHANNELS)
        weight = as_multiplied(
            decoded_tile(sketch, span, active_index, i, group), x.dtype.element_ty
        )  # [CHANNELS, OUTPUTS]
        held = active_index < sketch.num_active
        channel = tl.load(sketch.channel + active_index, mask=held, other=0)
        live = (token < tokens)[:, None] & held[None, :]
        place = x + token.to(tl.int64)[:, None] * sketch.width + channel[None, :]
        value = tl.load(place, mask=live, other=0.0).to(tl.float32)
        total += tl.sum(value[:, :, None] * weight[None, :, :], 1)
    output = span.start + group * span.n + i
    place = parts + (split * tokens + token).to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(place, total, mask=(token < tokens)[:, None] & (i < span.n)[None, :])


def few_tokens(x: Tensor, states: States, plan: Plan) -> Tensor:
    """``x Ŵᵀ``, [tokens, out], of contiguous ``x`` [tokens, in], tokens up to eight, and a plan with states."""
    tokens, outputs = len(x), plan.shape[0]
    known, sketch = sketch_argument(states, plan)
    parameters = launch_parameters("few_tokens", x.device)
    channels = parameters["channels"]
    tiles = sum(span.groups * triton.cdiv(span.size, parameters["outputs"]) for span in known.spans)
    splits = max(min(parameters["programs"] // tiles, triton.cdiv(plan.num_active, 4 * channels)), 1)
    each = triton.cdiv(triton.cdiv(plan.num_active, splits), channels) * channels
    splits = triton.cdiv(plan.num_active, each)
    parts = torch.empty(splits, tokens, outputs, dtype=torch.float32, device=x.device)
    for span in known.spans:
        size = power_of_two(span.size, 16, parameters["outputs"])
        few_tokens_kernel[span.groups * triton.cdiv(span.size, size), splits](
            x,
            parts,
            tokens,
            outputs,
            each,
            sketch,
            groups_argument(span),
            TOKENS=power_of_two(tokens),
            CHANNELS=channels,
            OUTPUTS=size,
            num_warps=parameters["num_warps"],
        )
    return parts.sum(0).to(x.dtype)
