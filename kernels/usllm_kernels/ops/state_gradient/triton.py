"""The states' gradient on CUDA, in three kernels, and one more where a query chooses between rows.

Gradients are brought into hash order as weights are for a projection, averaged bucket by bucket into one number for
each state, and read back where states are read by a query. Groups are done a few at a time, so that ordered gradients
stay in the second-level cache.
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
from usllm_kernels import compiled_operators
from usllm_kernels.cards import launch_parameters
from usllm_kernels.compiled_operators import combination, supports
from usllm_kernels.launch import groups_argument, power_of_two, sketch_argument
from usllm_kernels.ops.project.triton import ORDERED_BYTES, order_kernel
from usllm_kernels.triton_tile import (
    CLASS_COLUMNS,
    MAGNITUDE_MAX,
    MAGNITUDE_MIN,
    TOTAL,
    load_codes,
    rotated,
)

__all__ = ["state_gradient_", "supports"]


@triton.jit
def taken_kernel(
    taken,  # int8 [groups, channels with states, n], written
    first_group,
    sketch,
    span,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    parts = tl.cdiv(span.n, POSITIONS)
    here = tl.program_id(1) // parts
    active_index = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    q = tl.program_id(1) % parts * POSITIONS + tl.arange(0, POSITIONS)
    held = active_index < sketch.num_active
    row_of = tl.load(sketch.class_index + active_index, mask=held, other=0) * CLASS_COLUMNS
    rows = tl.load(span.shape + row_of, mask=held, other=0)
    states = tl.load(span.shape + row_of + 2, mask=held, other=0)
    table = tl.load(span.shape + row_of + 4, mask=held, other=0)
    place = tl.load(span.shape + row_of + 5, mask=held, other=0) + (first_group + here) * rows * states
    bits = tl.load(sketch.bits + active_index, mask=held, other=1)
    if sketch.PACKED:
        bit = tl.load(sketch.first_bit + active_index, mask=held, other=0) + place.to(tl.int64) * bits
        first, skip = bit >> 3, (bit & 7).to(tl.int32)
    else:
        first = tl.load(sketch.first_state + active_index, mask=held, other=0) + place
        skip = tl.zeros(place.shape, tl.int32)
    mask = held[:, None] & (q < span.n)[None, :]
    found = tl.zeros((CHANNELS, POSITIONS), tl.int32)
    best = tl.zeros((CHANNELS, POSITIONS), tl.int32)
    for row in range(sketch.ROWS):
        live = mask & (row < rows)[:, None]
        bucket = tl.load(span.buckets + table[:, None] + row * span.n + q[None, :], mask=live, other=0).to(tl.int32)
        code = load_codes(
            sketch.codes, first[:, None], bucket & 0xFFFF, skip[:, None], bits[:, None], live, sketch.PACKED
        )
        if sketch.COMBINATION == MAGNITUDE_MAX:  # of equal magnitudes the negative one
            key = 2 * tl.abs(code) + (code < 0).to(tl.int32)
        elif sketch.COMBINATION == MAGNITUDE_MIN:
            key = -tl.abs(code)
        else:
            key = code
        better = live & ((key > best) | (row == 0))  # of equal candidates the first
        found = tl.where(better, row, found)
        best = tl.where(better, key, best)
    target = taken + ((here * sketch.num_active + active_index).to(tl.int64) * span.n)[:, None] + q[None, :]
    tl.store(target, found.to(tl.int8), mask=mask)


@triton.jit
def means_kernel(
    ordered,  # float32 [groups, channels with states, n]
    taken,  # int8 [groups, channels with states, n], read where TAKEN
    means,  # float32 [states], written
    slots,
    first_group,
    sketch,
    span,
    TAKEN: tl.constexpr,
    STATES: tl.constexpr,
):
    active_index, here = tl.program_id(0), tl.program_id(1)
    row_of = tl.load(sketch.class_index + active_index) * CLASS_COLUMNS
    rows, depth = tl.load(span.shape + row_of), tl.load(span.shape + row_of + 1)
    states, table = tl.load(span.shape + row_of + 2), tl.load(span.shape + row_of + 3)
    place = tl.load(span.shape + row_of + 5) + (first_group + here) * rows * states
    target = means + tl.load(sketch.first_state + active_index) + place
    source = (here * sketch.num_active + active_index).to(tl.int64) * span.n
    for part in range(rows * tl.cdiv(states, STATES)):
        row = part // tl.cdiv(states, STATES)
        k = part % tl.cdiv(states, STATES) * STATES + tl.arange(0, STATES)
        mask = k < states
        total = tl.zeros((STATES,), tl.float32)
        held = tl.zeros((STATES,), tl.int32)
        for slot in range(depth):
            member = tl.load(slots + table + (row * depth + slot) * states + k, mask=mask, other=0).to(tl.int32)
            live = mask & (member < span.n)
            held += live.to(tl.int32)
            value = tl.load(ordered + source + member, mask=live, other=0.0)
            if TAKEN:
                value = tl.where(tl.load(taken + source + member, mask=live, other=-1) == row, value, 0.0)
            total += value
        divisor = tl.maximum(held, 1)
        if sketch.COMBINATION == TOTAL:
            divisor = divisor * rows
        tl.store(target + row * states + k, tl.div_rn(total, divisor.to(tl.float32)), mask=mask)


@triton.jit
def spread_kernel(
    means,  # float32 [states]
    gradient,  # float32 [out, in], rows contiguous, written
    pitch,
    first_group,
    active_index_of,  # int32 [in], -1 for channels without states
    sketch,
    span,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    parts = tl.cdiv(span.n, OUTPUTS)
    group = first_group + tl.program_id(1) // parts
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.program_id(1) % parts * OUTPUTS + tl.arange(0, OUTPUTS)
    active_index = tl.load(active_index_of + channel, mask=channel < sketch.width, other=-1)
    held = active_index >= 0
    row_of = tl.load(sketch.class_index + active_index, mask=held, other=0) * CLASS_COLUMNS
    rows = tl.load(span.shape + row_of, mask=held, other=0)
    states = tl.load(span.shape + row_of + 2, mask=held, other=0)
    table = tl.load(span.shape + row_of + 4, mask=held, other=0)
    place = tl.load(span.shape + row_of + 5, mask=held, other=0) + group * rows * states
    first = tl.load(sketch.first_state + active_index, mask=held, other=0) + place
    q = rotated(i, channel, group, span.n, span.rotation, sketch.width, sketch.ROTATION_STEP)
    mask = held[:, None] & (i < span.n)[None, :]
    total = tl.zeros(q.shape, tl.float32)
    for row in range(sketch.ROWS):
        live = mask & (row < rows)[:, None]
        bucket = tl.load(span.buckets + table[:, None] + row * span.n + q, mask=live, other=0).to(tl.int32) & 0xFFFF
        total += tl.load(means + first[:, None] + bucket, mask=live, other=0.0)
    output = (span.start + group * span.n + i).to(tl.int64)
    target = gradient + output[:, None] * pitch + channel[None, :]
    tl.store(target, tl.trans(total), mask=(i < span.n)[:, None] & (channel < sketch.width)[None, :])


def state_gradient_(gradient: Tensor, plan: Plan, states: States) -> None:
    """:func:`usllm.sketch.state_gradient.state_gradient_` in place, of an fp32 gradient."""
    if not plan.blocks:
        gradient.zero_()
        return
    rows_first = gradient if gradient.stride(1) == 1 else gradient.contiguous()
    device, (_, width) = gradient.device, plan.shape
    known, sketch = sketch_argument(states, plan, output_scale=False)
    means = torch.empty(plan.num_states, dtype=torch.float32, device=device)
    choosing = known.rows > 1 and combination(plan) != compiled_operators.TOTAL
    order, query = launch_parameters("order", device), launch_parameters("query", device)
    block = power_of_two(known.states, 16, 256)
    for span in known.spans:
        step = min(max(ORDERED_BYTES // (4 * plan.num_active * span.size), 1), span.groups)
        ordered = torch.empty(step, plan.num_active, span.size, dtype=torch.float32, device=device)
        taken = torch.empty(ordered.shape if choosing else (0,), dtype=torch.int8, device=device)
        ordering = power_of_two(span.size, 16, order["outputs"])
        writing = power_of_two(span.size, 16, query["outputs"])
        for first in range(0, span.groups, step):
            groups = min(step, span.groups - first)
            order_kernel[triton.cdiv(width, order["channels"]), groups * triton.cdiv(span.size, ordering)](
                rows_first,
                *rows_first.stride(),
                ordered,
                known.active_index_of,
                first,
                plan.num_active,
                span.start,
                span.size,
                span.rotation,
                width,
                ROTATION_STEP=plan.rotation_step,
                KEYS=False,
                CHANNELS=order["channels"],
                OUTPUTS=ordering,
                num_warps=order["num_warps"],
            )
            if choosing:
                grid = triton.cdiv(plan.num_active, query["channels"]), groups * triton.cdiv(span.size, writing)
                taken_kernel[grid](
                    taken,
                    first,
                    sketch,
                    groups_argument(span),
                    CHANNELS=query["channels"],
                    POSITIONS=writing,
                    num_warps=query["num_warps"],
                )
            means_kernel[plan.num_active, groups](
                ordered,
                taken,
                means,
                span.slots,
                first,
                sketch,
                groups_argument(span),
                TAKEN=choosing,
                STATES=block,
                num_warps=max(block // 64, 1),
            )
            spread_kernel[triton.cdiv(width, query["channels"]), groups * triton.cdiv(span.size, writing)](
                means,
                rows_first,
                rows_first.stride(0),
                first,
                known.active_index_of,
                sketch,
                groups_argument(span),
                CHANNELS=query["channels"],
                OUTPUTS=writing,
                num_warps=query["num_warps"],
            )
    if rows_first is not gradient:
        gradient.copy_(rows_first)
