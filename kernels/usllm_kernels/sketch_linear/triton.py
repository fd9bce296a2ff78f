"""Products with the decoded weight on CUDA that never write it: tiles of it are made where they are used.

``y = x Ŵᵀ`` for up to eight tokens splits the channels over programs, so that enough of them read states, and adds
their parts up in a fixed order. Up to one tile of tokens it is a product of tiles, each weight decoded once. Beyond,
tiles would decode every weight once for each tile of tokens: there it is decoded once, a slab of outputs at a time, and
the library multiplies. ``dx = dy Ŵ`` is the same product turned.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.launch import decoding, dot_in_float32, of_span, power_of_two, target
from usllm_kernels.query.triton import query_groups
from usllm_kernels.tile import as_stored, decoded_tile

FEW_TOKENS = 8
TILE_TOKENS = 128
_SLAB = 1 << 25  # weights decoded at once: 64 MiB in bfloat16
_PROGRAMS = 512  # a few for each multiprocessor of a large card


@triton.jit
def few_tokens_kernel(
    x,  # [tokens, in]
    parts,  # float32 [splits, tokens, out], written
    tokens,
    outputs,
    channels_each,  # channels of one split, a multiple of CHANNELS
    codes,
    scales,
    scale_base,
    output_scales,
    output_scale_base,
    position,
    block,
    first_state,
    first_bit,
    bits,
    shape,
    buckets,
    start,
    n,
    rotation,
    width,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COMBINATION: tl.constexpr,
    PACKED: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    tiles = tl.cdiv(n, OUTPUTS)
    group = tl.program_id(0) // tiles
    i = tl.program_id(0) % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for first in range(split * channels_each, tl.minimum((split + 1) * channels_each, width), CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        weight = decoded_tile(
            codes,
            scales,
            scale_base,
            output_scales,
            output_scale_base,
            position,
            block,
            first_state,
            first_bit,
            bits,
            shape,
            buckets,
            channel,
            i,
            group,
            start,
            n,
            rotation,
            width,
            STEP,
            ROWS,
            COMBINATION,
            PACKED,
            OUTPUT_SCALE,
        )  # [CHANNELS, OUTPUTS]
        live = (token < tokens)[:, None] & (channel < width)[None, :]
        value = tl.load(x + token.to(tl.int64)[:, None] * width + channel[None, :], mask=live, other=0.0).to(tl.float32)
        total += tl.sum(value[:, :, None] * weight[None, :, :], 1)
    place = parts + (split * tokens + token).to(tl.int64)[:, None] * outputs + (start + group * n + i)[None, :]
    tl.store(place, total, mask=(token < tokens)[:, None] & (i < n)[None, :])


@triton.jit
def many_tokens_kernel(
    x,  # [tokens, in]
    out,  # [tokens, out], written
    tokens,
    outputs,
    codes,
    scales,
    scale_base,
    output_scales,
    output_scale_base,
    position,
    block,
    first_state,
    first_bit,
    bits,
    shape,
    buckets,
    start,
    n,
    rotation,
    width,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COMBINATION: tl.constexpr,
    PACKED: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    BFLOAT16: tl.constexpr,
    FLOAT32: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    tiles = tl.cdiv(n, OUTPUTS)
    group = tl.program_id(1) // tiles
    i = tl.program_id(1) % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for first in range(0, width, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        weight = decoded_tile(
            codes,
            scales,
            scale_base,
            output_scales,
            output_scale_base,
            position,
            block,
            first_state,
            first_bit,
            bits,
            shape,
            buckets,
            channel,
            i,
            group,
            start,
            n,
            rotation,
            width,
            STEP,
            ROWS,
            COMBINATION,
            PACKED,
            OUTPUT_SCALE,
        )  # [CHANNELS, OUTPUTS]
        live = (token < tokens)[:, None] & (channel < width)[None, :]
        value = tl.load(x + token[:, None] * width + channel[None, :], mask=live, other=0.0)
        if FLOAT32:
            total += tl.dot(value.to(tl.float32), weight, input_precision="ieee")
        else:
            total += tl.dot(value, weight.to(value.dtype))
    place = out + token[:, None] * outputs + (start + group * n + i)[None, :]
    stored = as_stored(total, BFLOAT16, out.dtype.element_ty)
    tl.store(place, stored, mask=(token < tokens)[:, None] & (i < n)[None, :])


@triton.jit
def input_gradient_kernel(
    gradient,  # [tokens, out]
    total_in,  # float32 [tokens, in], read and written: spans are added up one after another
    tokens,
    outputs,
    groups,
    codes,
    scales,
    scale_base,
    output_scales,
    output_scale_base,
    position,
    block,
    first_state,
    first_bit,
    bits,
    shape,
    buckets,
    start,
    n,
    rotation,
    width,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COMBINATION: tl.constexpr,
    PACKED: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    FIRST_SPAN: tl.constexpr,
    FLOAT32: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    place = total_in + token[:, None] * width + channel[None, :]
    kept = (token < tokens)[:, None] & (channel < width)[None, :]
    if FIRST_SPAN:
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    else:
        total = tl.load(place, mask=kept, other=0.0)
    tiles = tl.cdiv(n, OUTPUTS)
    for tile in range(groups * tiles):
        group = tile // tiles
        i = tile % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
        weight = decoded_tile(
            codes,
            scales,
            scale_base,
            output_scales,
            output_scale_base,
            position,
            block,
            first_state,
            first_bit,
            bits,
            shape,
            buckets,
            channel,
            i,
            group,
            start,
            n,
            rotation,
            width,
            STEP,
            ROWS,
            COMBINATION,
            PACKED,
            OUTPUT_SCALE,
        )  # [CHANNELS, OUTPUTS]
        live = (token < tokens)[:, None] & (i < n)[None, :]
        value = tl.load(gradient + token[:, None] * outputs + (start + group * n + i)[None, :], mask=live, other=0.0)
        if FLOAT32:
            total += tl.dot(value.to(tl.float32), tl.trans(weight), input_precision="ieee")
        else:
            total += tl.dot(value, tl.trans(weight.to(value.dtype)))
    tl.store(place, total, mask=kept)


def sketch_linear(x: Tensor, states: States, plan: Plan) -> Tensor:
    """``x Ŵᵀ``, [tokens, out], in the dtype of ``x`` [tokens, in]; accumulated in float32."""
    x = x.contiguous()
    tokens, width = x.shape
    outputs = plan.shape[0]
    if not plan.blocks or not tokens:
        return x.new_zeros(tokens, outputs)
    known, arguments = decoding(states, plan)
    if tokens <= FEW_TOKENS:
        channels = 16
        tiles = sum(span.groups * triton.cdiv(span.size, 128) for span in known.spans)
        splits = max(min(_PROGRAMS // tiles, triton.cdiv(width, 4 * channels)), 1)
        each = triton.cdiv(triton.cdiv(width, splits), channels) * channels
        splits = triton.cdiv(width, each)
        parts = torch.empty(splits, tokens, outputs, dtype=torch.float32, device=x.device)
        for span in known.spans:
            size = power_of_two(span.size, 16, 128)
            few_tokens_kernel[span.groups * triton.cdiv(span.size, size), splits](
                x,
                parts,
                tokens,
                outputs,
                each,
                **arguments,
                **of_span(span),
                TOKENS=power_of_two(tokens),
                CHANNELS=channels,
                OUTPUTS=size,
                num_warps=4,
            )
        return parts.sum(0).to(x.dtype)
    out = x.new_empty(tokens, outputs)
    if tokens > TILE_TOKENS:
        for part, slab in _slabs(states, plan, x.dtype):
            torch.mm(x, slab.t(), out=out[:, part])
        return out
    for span in known.spans:
        size, rows = power_of_two(span.size, 16, 128), power_of_two(tokens, 16, TILE_TOKENS)
        many_tokens_kernel[triton.cdiv(tokens, rows), span.groups * triton.cdiv(span.size, size)](
            x=x,
            **target(out),
            tokens=tokens,
            outputs=outputs,
            **arguments,
            **of_span(span),
            FLOAT32=dot_in_float32() or x.dtype == torch.float32,
            TOKENS=rows,
            CHANNELS=32,
            OUTPUTS=size,
            num_warps=8 if rows * size >= 128 * 128 else 4,
        )
    return out


def input_gradient(gradient: Tensor, states: States, plan: Plan) -> Tensor:
    """``dy Ŵ``, [tokens, in], in the dtype of ``gradient`` [tokens, out]; accumulated in float32."""
    gradient = gradient.contiguous()  # that of a sum is one number expanded
    tokens, outputs = gradient.shape
    width = plan.shape[1]
    if not plan.blocks or not tokens:
        return gradient.new_zeros(tokens, width)
    if tokens > TILE_TOKENS:
        parts = [gradient[:, part] @ slab for part, slab in _slabs(states, plan, gradient.dtype)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0, dtype=torch.float32).to(gradient.dtype)
    known, arguments = decoding(states, plan)
    total = torch.empty(tokens, width, dtype=torch.float32, device=gradient.device)
    for number, span in enumerate(known.spans):
        rows, channels = power_of_two(tokens, 16, TILE_TOKENS), power_of_two(width, 16, 64)
        input_gradient_kernel[triton.cdiv(tokens, rows), triton.cdiv(width, channels)](
            gradient,
            total,
            tokens,
            outputs,
            span.groups,
            **arguments,
            **of_span(span),
            FIRST_SPAN=number == 0,
            FLOAT32=dot_in_float32() or gradient.dtype == torch.float32,
            TOKENS=rows,
            CHANNELS=channels,
            OUTPUTS=power_of_two(span.size, 16, 32),
            num_warps=4,
        )
    return total.to(gradient.dtype)


def _slabs(states: States, plan: Plan, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Output rows and their decoded weight [rows, in], the whole at once where it is small enough."""
    (outputs, width), device = plan.shape, states["codes"].device
    whole = outputs * width <= _SLAB
    slab = torch.empty(outputs if whole else 0, width, dtype=dtype, device=device)
    for number, span in enumerate(plan.spans):
        step = span.groups if whole else max(_SLAB // (span.size * width), 1)
        for first in range(0, span.groups, step):
            groups = min(step, span.groups - first)
            rows = slice(span.start + first * span.size, span.start + (first + groups) * span.size)
            if not whole:
                slab = torch.empty(groups * span.size, width, dtype=dtype, device=device)
            query_groups(states, plan, number, first, groups, slab[rows] if whole else slab)
            if not whole:
                yield rows, slab
    if whole:
        yield slice(0, outputs), slab
