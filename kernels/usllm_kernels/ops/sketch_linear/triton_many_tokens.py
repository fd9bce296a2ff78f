"""Products of one tile of tokens on CUDA: tiles of the weight are decoded where they are multiplied."""

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
from usllm_kernels.launch import dot_in_float32, groups_argument, power_of_two, sketch_argument, target
from usllm_kernels.triton_tile import as_multiplied, as_stored, decoded_tile


@triton.jit
def many_tokens_kernel(
    x,  # [tokens, channels with states], in storage order
    out,  # [tokens, out], written
    tokens,
    outputs,
    sketch,
    span,
    BFLOAT16: tl.constexpr,
    FLOAT32: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    tiles = tl.cdiv(span.n, OUTPUTS)
    group = tl.program_id(1) // tiles
    i = tl.program_id(1) % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for first in range(0, sketch.num_active, CHANNELS):
        active_index = first + tl.arange(0, CHANNELS)
        weight = decoded_tile(sketch, span, active_index, i, group)  # [CHANNELS, OUTPUTS]
        live = (token < tokens)[:, None] & (active_index < sketch.num_active)[None, :]
        value = tl.load(x + token[:, None] * sketch.num_active + active_index[None, :], mask=live, other=0.0)
        if FLOAT32:
            weight = as_multiplied(weight, x.dtype.element_ty)
            total += tl.dot(value.to(tl.float32), weight, input_precision="ieee")
        else:
            total += tl.dot(value, weight.to(value.dtype))
    place = out + token[:, None] * outputs + (span.start + group * span.n + i)[None, :]
    stored = as_stored(total, BFLOAT16, out.dtype.element_ty)
    tl.store(place, stored, mask=(token < tokens)[:, None] & (i < span.n)[None, :])


def many_tokens(x: Tensor, states: States, plan: Plan, tile: int) -> Tensor:
    """``x Ŵᵀ``, [tokens, out], of ``x`` [tokens, in] and a plan with states.

    Every ``tile`` tokens decode the weight once.
    """
    known, sketch = sketch_argument(states, plan)
    held = x.index_select(1, known.channel)
    tokens, outputs = len(x), plan.shape[0]
    out = x.new_empty(tokens, outputs)
    rows = power_of_two(tokens, 16, tile)
    float32 = dot_in_float32() or x.dtype not in (torch.bfloat16, torch.float16)
    parameters = launch_parameters("many_tokens", x.device)
    warps = parameters["num_warps" if rows >= 128 else "num_warps_below_128_tokens"]
    for span in known.spans:
        size = power_of_two(span.size, 16, 32 if float32 else parameters["outputs"])
        many_tokens_kernel[triton.cdiv(tokens, rows), span.groups * triton.cdiv(span.size, size)](
            x=held,
            **target(out),
            tokens=tokens,
            outputs=outputs,
            sketch=sketch,
            span=groups_argument(span),
            FLOAT32=float32,
            TOKENS=rows,
            CHANNELS=16 if float32 else parameters["channels"],
            OUTPUTS=size,
            num_warps=warps if size >= 64 else 4,
        )
    return out
