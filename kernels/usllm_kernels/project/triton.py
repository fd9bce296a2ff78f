"""Projection on CUDA: latent weight -> states.

Four kernels. The first brings the weights into hash order, channel by channel, reading and writing whole lines; what
it writes is read again from the second-level cache where a layer fits into it. The second reduces every bucket of a
channel and group, whose members lie in two kilobytes. The third sums up each channel in whole numbers, so that the
scales do not depend on an order; the fourth quantises.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States, fit_output_scales, store_scales
from usllm.sketch.quantize import DROPPED_BITS, LEAST_EXPONENT, ChannelSums
from usllm_kernels.launch import power_of_two
from usllm_kernels.query.triton import query
from usllm_kernels.tables import Tables, tables
from usllm_kernels.tile import rotated

_MINIMUM = tl.constexpr(0)
_SUM = tl.constexpr(1)
_MEAN = tl.constexpr(2)
_REDUCTIONS = {"absmaxmin": 0, "countmin": 1, "mean": 2}

_EMPTY = tl.constexpr(2**31 - 1)
_MAGNITUDE = tl.constexpr(0x7FFFFFFE)
_SHAPE = tl.constexpr(6)
_DROPPED_BITS = tl.constexpr(DROPPED_BITS)
_LEAST_EXPONENT = tl.constexpr(LEAST_EXPONENT)
_HALVES = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to nearest even


@triton.jit
def order_kernel(
    weight,  # [out, in], any float type
    row_stride,
    column_stride,
    ordered,  # int32 keys or float32 [groups, channels with states, n], written
    position,
    numbers,  # channels with states
    start,
    n,
    rotation,
    width,
    STEP: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    parts = tl.cdiv(n, OUTPUTS)
    group = tl.program_id(1) // parts
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.program_id(1) % parts * OUTPUTS + tl.arange(0, OUTPUTS)
    row = (start + group * n + i).to(tl.int64)
    mask = (i < n)[:, None] & (channel < width)[None, :]
    place = weight + row[:, None] * row_stride + channel.to(tl.int64)[None, :] * column_stride
    value = tl.trans(tl.load(place, mask=mask, other=0.0).to(tl.float32))  # [CHANNELS, OUTPUTS]
    number = tl.load(position + channel, mask=channel < width, other=-1)
    q = rotated(i, channel, group, n, rotation, width, STEP)
    target = ordered + ((group * numbers + number).to(tl.int64) * n)[:, None] + q
    live = (number >= 0)[:, None] & (i < n)[None, :]
    if KEYS:
        bits = value.to(tl.int32, bitcast=True)
        tl.store(target, (bits & _MAGNITUDE) - (bits >> 31), mask=live)
    else:
        tl.store(target, value, mask=live)


@triton.jit
def reduce_kernel(
    ordered,
    values,  # int32 keys or float32 [states], written
    winners,  # int16 [states], written
    block,
    first_state,
    shape,
    slots,
    numbers,
    n,
    REDUCTION: tl.constexpr,
    WINNERS: tl.constexpr,
    STATES: tl.constexpr,
):
    number, group = tl.program_id(0), tl.program_id(1)
    row_of = tl.load(block + number) * _SHAPE
    rows, depth = tl.load(shape + row_of), tl.load(shape + row_of + 1)
    states, table = tl.load(shape + row_of + 2), tl.load(shape + row_of + 3)
    first = tl.load(first_state + number) + tl.load(shape + row_of + 5) + group * rows * states
    source = ordered + (group * numbers + number).to(tl.int64) * n
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


@triton.jit
def as_bits(value, KEYS: tl.constexpr):
    """Bit patterns of float32: keys hold the magnitude above and the sign in the lowest bit."""
    if KEYS:
        return (value & _MAGNITUDE) | (value << 31)
    return value.to(tl.int32, bitcast=True)


@triton.jit
def sums_kernel(
    values,
    first_state,
    count,
    largest,  # int32 [channels with states], bit patterns, written
    total,  # int64, written
    squares,  # int64, written
    KEYS: tl.constexpr,
    STATES: tl.constexpr,
):
    number = tl.program_id(0)
    first, states = tl.load(first_state + number), tl.load(count + number)
    most = tl.zeros((STATES,), tl.int32)
    for part in range(tl.cdiv(states, STATES)):
        k = part * STATES + tl.arange(0, STATES)
        bits = as_bits(tl.load(values + first + k, mask=k < states, other=0), KEYS) & 0x7FFFFFFF
        most = tl.maximum(most, bits)
    peak = tl.max(most, 0)
    exponent = tl.maximum(peak >> 23, _LEAST_EXPONENT) + _DROPPED_BITS
    one = tl.zeros((STATES,), tl.int64)
    two = tl.zeros((STATES,), tl.int64)
    for part in range(tl.cdiv(states, STATES)):
        k = part * STATES + tl.arange(0, STATES)
        live = k < states
        bits = as_bits(tl.load(values + first + k, mask=live, other=0), KEYS) & 0x7FFFFFFF
        shift = tl.minimum(exponent - (bits >> 23), 31)
        magnitude = tl.where(live, ((bits & 0x7FFFFF) | 0x800000) >> shift, 0).to(tl.int64)
        one += magnitude
        two += magnitude * magnitude
    tl.store(largest + number, peak)
    tl.store(total + number, tl.sum(one, 0))
    tl.store(squares + number, tl.sum(two, 0))


@triton.jit
def quantize_kernel(
    values,
    codes,  # int8 or int16 [states], written
    scales,  # float32 [channels with states]
    first_state,
    count,
    bits,
    KEYS: tl.constexpr,
    NEAREST: tl.constexpr,
    STATES: tl.constexpr,
):
    number = tl.program_id(0)
    states, width = tl.load(count + number), tl.load(bits + number)
    first, scale = tl.load(first_state + number), tl.load(scales + number)
    limit = ((1 << (width - 1)) - 1).to(tl.float32)
    for part in range(tl.cdiv(states, STATES)):
        k = part * STATES + tl.arange(0, STATES)
        live = k < states
        value = as_bits(tl.load(values + first + k, mask=live, other=0), KEYS).to(tl.float32, bitcast=True)
        inside = tl.minimum(tl.maximum(tl.div_rn(value, scale), -limit), limit)
        if NEAREST:
            inside = (inside + _HALVES) - _HALVES
        code = tl.where(width == 1, tl.where(value >= 0.0, 1, -1), inside.to(tl.int32))
        tl.store(codes + first + k, code.to(codes.dtype.element_ty), mask=live)


def project(weight: Tensor, plan: Plan, moment: Tensor | None = None, winners: Tensor | None = None) -> States:
    """States of a latent weight [out, in] of any strides and float type."""
    device = weight.device
    if not plan.blocks:
        return plan.state_tensors(device)
    states = plan.state_tensors(device, filled=False)
    known = tables(plan, device)
    keys = plan.config.operator == "absmaxmin"
    values = _values(weight, plan, known, keys, winners)
    total, squares = torch.empty(2, plan.num_scales, dtype=torch.int64, device=device)
    largest = torch.empty(plan.num_scales, dtype=torch.int32, device=device)
    block = power_of_two(max(block.states_per_channel for block in plan.blocks), 16, 1024)
    grid = (plan.num_scales,)
    sums_kernel[grid](values, known.first_state, known.sizes, largest, total, squares, KEYS=keys, STATES=block)
    scales = store_scales(states, plan, ChannelSums(largest.view(torch.float32), total, squares))
    places = known.first_state, known.sizes, known.bits
    nearest = plan.config.rounding == "nearest"
    quantize_kernel[grid](values, states["codes"], scales, *places, KEYS=keys, NEAREST=nearest, STATES=block)
    if plan.config.output_scale:
        fit_output_scales(weight, query(states, plan, output_scale=False), states, moment)
    return states


def _values(weight: Tensor, plan: Plan, known: Tables, keys: bool, winners: Tensor | None) -> Tensor:
    dtype, device = torch.int32 if keys else torch.float32, weight.device
    width, numbers = plan.shape[1], plan.num_scales
    values = torch.empty(plan.num_states, dtype=dtype, device=device)
    kept = values if winners is None else winners
    for span in known.spans:
        ordered = torch.empty(span.groups, numbers, span.size, dtype=dtype, device=device)
        channels, outputs = 32, power_of_two(span.size, 16, 128)
        order_kernel[triton.cdiv(width, channels), span.groups * triton.cdiv(span.size, outputs)](
            weight,
            *weight.stride(),
            ordered,
            known.position,
            numbers,
            span.start,
            span.size,
            span.rotation,
            width,
            STEP=plan.turns,
            KEYS=keys,
            CHANNELS=channels,
            OUTPUTS=outputs,
        )
        block = power_of_two(known.states, 16, 256)
        reduce_kernel[numbers, span.groups](
            ordered,
            values,
            kept,
            known.block,
            known.first_state,
            span.shape,
            span.slots,
            numbers,
            span.size,
            REDUCTION=_REDUCTIONS[plan.config.operator],
            WINNERS=winners is not None,
            STATES=block,
            num_warps=max(block // 64, 1),
        )
    return values
