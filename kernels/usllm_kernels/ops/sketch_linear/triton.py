"""Products with the decoded weight on CUDA; only channels that hold states are multiplied.

There are three ways, by the number of tokens. Up to eight, and up to one tile, each weight is decoded where it is used
and never written. Beyond, every tile of tokens would decode all weights: instead they are decoded once, a slab at a
time, and torch multiplies. A slab holds all terms of its sums, so that no rounded partial sums are added.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Annotations mean something else to Triton.

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.compiled_operators import supports
from usllm_kernels.ops.query.triton import query_groups
from usllm_kernels.ops.sketch_linear.op import SLAB
from usllm_kernels.ops.sketch_linear.triton_few_tokens import few_tokens
from usllm_kernels.ops.sketch_linear.triton_input_gradient import few_tokens_gradient
from usllm_kernels.ops.sketch_linear.triton_many_tokens import many_tokens
from usllm_kernels.tables import tables

__all__ = ["input_gradient", "sketch_linear", "supports"]

FEW_TOKENS = 8
TILE_TOKENS = 128


def sketch_linear(x: Tensor, states: States, plan: Plan) -> Tensor:
    """``x Ŵᵀ``, [tokens, out], in the dtype of ``x`` [tokens, in]; accumulated in float32."""
    tokens, outputs = len(x), plan.shape[0]
    if not plan.blocks or not tokens:
        return x.new_zeros(tokens, outputs)
    if tokens <= FEW_TOKENS:
        return few_tokens(x.contiguous(), states, plan)
    if tokens <= TILE_TOKENS:
        return many_tokens(x, states, plan, TILE_TOKENS)
    held = x.index_select(1, tables(plan, x.device).channel)
    out = x.new_empty(tokens, outputs)
    for span_index, span in enumerate(plan.spans):
        step = max(SLAB // (span.size * plan.num_active), 1)
        for first in range(0, span.groups, step):
            groups = range(first, min(first + step, span.groups))
            slab = x.new_empty(len(groups) * span.size, plan.num_active)
            query_groups(states, plan, span_index, groups, slab, range(plan.num_active))
            start = span.start + first * span.size
            torch.mm(held, slab.t(), out=out[:, start : start + len(slab)])
    return out


def input_gradient(gradient: Tensor, states: States, plan: Plan) -> Tensor:
    """``dy Ŵ``, [tokens, in], in the dtype of ``gradient`` [tokens, out]; accumulated in float32."""
    gradient = gradient.contiguous()  # that of a sum is one span_index expanded
    tokens, outputs = gradient.shape
    found = gradient.new_zeros(tokens, plan.shape[1])
    if not plan.blocks or not tokens:
        return found
    channel = tables(plan, gradient.device).channel
    if tokens <= TILE_TOKENS:
        held = few_tokens_gradient(gradient, states, plan, TILE_TOKENS).to(gradient.dtype)
        return found.index_copy_(1, channel.long(), held)
    step = max(SLAB // outputs, 1)
    for first in range(0, plan.num_active, step):
        active = range(first, min(first + step, plan.num_active))
        slab = gradient.new_empty(outputs, len(active))
        for span_index, span in enumerate(plan.spans):
            rows = slab[span.start : span.start + span.groups * span.size]
            query_groups(states, plan, span_index, range(span.groups), rows, active)
        found.index_copy_(1, channel[first : active.stop].long(), gradient @ slab)
    return found
