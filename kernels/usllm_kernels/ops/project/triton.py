"""Projection on CUDA: latent weight -> states, in four kernels.

The first brings the weights into hash order, channel by channel, reading and writing whole lines. The second reduces
every bucket of a channel and group, whose members lie within two kilobytes. Both alternate, a few groups at a time, on
one buffer that fits the second-level cache: each weight is read once from memory, and the ordered ones stay in the
cache. The other two (:mod:`usllm_kernels.ops.project.triton_states`) choose scales and quantise.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Annotations mean something else to Triton.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States, best_output_scale, store_output_scales
from usllm_kernels import compiled_operators
from usllm_kernels.cards import launch_parameters
from usllm_kernels.compiled_operators import reduction, supports
from usllm_kernels.launch import power_of_two
from usllm_kernels.ops.project.triton_output_sums import output_sums
from usllm_kernels.ops.project.triton_states import MAGNITUDE, store_states
from usllm_kernels.tables import Tables, tables
from usllm_kernels.triton_tile import CLASS_COLUMNS, rotated

__all__ = ["project", "supports"]

ORDERED_BYTES = 1 << 24  # of the buffer: well below the 40 MB or more of second-level cache of large cards

_MINIMUM = tl.constexpr(compiled_operators.MINIMUM)
_MEAN = tl.constexpr(compiled_operators.MEAN)

_EMPTY = tl.constexpr(2**31 - 1)


@triton.jit
def order_kernel(
    weight,  # [out, in], any float type
    row_stride,
    column_stride,
    ordered,  # int32 keys or float32 [groups, channels with states, n], written
    active_index_of,  # int32 [in], -1 for channels without states
    first_group,  # of these groups, within the span
    num_active,  # channels that hold states
    start,
    n,
    rotation,
    width,
    ROTATION_STEP: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    parts = tl.cdiv(n, OUTPUTS)
    here = tl.program_id(1) // parts
    group = first_group + here
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.program_id(1) % parts * OUTPUTS + tl.arange(0, OUTPUTS)
    row = (start + group * n + i).to(tl.int64)
    mask = (i < n)[:, None] & (channel < width)[None, :]
    place = weight + row[:, None] * row_stride + channel.to(tl.int64)[None, :] * column_stride
    value = tl.trans(tl.load(place, mask=mask, other=0.0).to(tl.float32))  # [CHANNELS, OUTPUTS]
    active_index = tl.load(active_index_of + channel, mask=channel < width, other=-1)
    q = rotated(i, channel, group, n, rotation, width, ROTATION_STEP)
    target = ordered + ((here * num_active + active_index).to(tl.int64) * n)[:, None] + q
    live = (active_index >= 0)[:, None] & (i < n)[None, :]
    if KEYS:
        bits = value.to(tl.int32, bitcast=True)
        tl.store(target, (bits & MAGNITUDE) - (bits >> 31), mask=live)
    else:
        tl.store(target, value, mask=live)


@triton.jit
def reduce_kernel(
    ordered,
    values,  # int32 keys or float32 [states], written
    winners,  # int16 [states], written
    class_index,  # int32 [channels with states]
    first_state,
    shape,
    slots,
    first_group,
    num_active,
    n,
    REDUCTION: tl.constexpr,
    WINNERS: tl.constexpr,
    STATES: tl.constexpr,
):
    active_index, here = tl.program_id(0), tl.program_id(1)
    group = first_group + here
    row_of = tl.load(class_index + active_index) * CLASS_COLUMNS
    rows, depth = tl.load(shape + row_of), tl.load(shape + row_of + 1)
    states, table = tl.load(shape + row_of + 2), tl.load(shape + row_of + 3)
    first = tl.load(first_state + active_index) + tl.load(shape + row_of + 5) + group * rows * states
    source = ordered + (here * num_active + active_index).to(tl.int64) * n
    for part in range(rows * tl.cdiv(states, STATES)):
        row = part // tl.cdiv(states, STATES)
        k = part % tl.cdiv(states, STATES) * STATES + tl.arange(0, STATES)
        mask = k < states
        winner = tl.zeros((STATES,), tl.int32)
        if REDUCTION == _MINIMUM:
            joined = tl.full((STATES,), _EMPTY, tl.int32)
        else:
            joined = tl.zeros((STATES,), tl.float32)
        held = tl.zeros((STATES,), tl.int32)
        for slot in range(depth):
            member = tl.load(slots + table + (row * depth + slot) * states + k, mask=mask, other=0).to(tl.int32)
            live = mask & (member < n)
            if REDUCTION == _MINIMUM:
                value = tl.load(source + member, mask=live, other=_EMPTY)
                winner = tl.where(value < joined, member, winner)
                joined = tl.minimum(joined, value)
            else:  # one after another, as the reference adds them
                joined += tl.load(source + member, mask=live, other=0.0)
                held += live.to(tl.int32)
        if REDUCTION == _MINIMUM:
            joined = tl.where(joined == _EMPTY, 0, joined)
        if REDUCTION == _MEAN:
            joined = tl.div_rn(joined, tl.maximum(held, 1).to(tl.float32))
        tl.store(values + first + row * states + k, joined, mask=mask)
        if WINNERS:
            tl.store(winners + first + row * states + k, winner.to(tl.int16), mask=mask)


def project(
    weight: Tensor,
    plan: Plan,
    second_moment: Tensor | None = None,
    winners: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> States:
    """States of a latent weight [out, in] of any strides and float type."""
    device = weight.device
    if not plan.blocks:
        return plan.state_tensors(device)
    states, known = plan.state_tensors(device, filled=False), tables(plan, device)
    keys = reduction(plan) == compiled_operators.MINIMUM
    store_states(_values(weight, plan, known, keys, winners), plan, known, states, keys=keys)
    if plan.config.output_scale:
        if output_scale is None:
            output_scale = best_output_scale(*output_sums(weight, states, plan, second_moment))
        store_output_scales(states, output_scale)
    return states


def _values(weight: Tensor, plan: Plan, known: Tables, keys: bool, winners: Tensor | None) -> Tensor:
    dtype, device = torch.int32 if keys else torch.float32, weight.device
    width, num_active = plan.shape[1], plan.num_active
    values = torch.empty(plan.num_states, dtype=dtype, device=device)
    into = values if winners is None else winners  # nothing is written unless winners are asked for
    parameters = launch_parameters("order", device)
    for span in known.spans:
        step = min(max(ORDERED_BYTES // (4 * num_active * span.size), 1), span.groups)
        ordered = torch.empty(step, num_active, span.size, dtype=dtype, device=device)
        channels, outputs = parameters["channels"], power_of_two(span.size, 16, parameters["outputs"])
        states = power_of_two(known.states, 16, 256)
        for first in range(0, span.groups, step):
            groups = min(step, span.groups - first)
            order_kernel[triton.cdiv(width, channels), groups * triton.cdiv(span.size, outputs)](
                weight,
                *weight.stride(),
                ordered,
                known.active_index_of,
                first,
                num_active,
                span.start,
                span.size,
                span.rotation,
                width,
                ROTATION_STEP=plan.rotation_step,
                KEYS=keys,
                CHANNELS=channels,
                OUTPUTS=outputs,
                num_warps=parameters["num_warps"],
            )
            reduce_kernel[num_active, groups](
                ordered,
                values,
                into,
                known.class_index,
                known.first_state,
                span.shape,
                span.slots,
                first,
                num_active,
                span.size,
                REDUCTION=reduction(plan),
                WINNERS=winners is not None,
                STATES=states,
                num_warps=max(states // 64, 1),
            )
    return values
