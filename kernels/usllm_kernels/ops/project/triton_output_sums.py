"""Sums from which output scales are fitted, on CUDA; weights are decoded where they are used."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Annotations mean something else to Triton.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.launch import groups_argument, power_of_two, sketch_argument
from usllm_kernels.triton_tile import decoded_tile

_CHANNELS = 32
_PROGRAMS = 512  # a few for each multiprocessor of a large card


@triton.jit
def output_sums_kernel(
    weight,  # [out, in], any float type
    row_stride,
    column_stride,
    second_moment,  # float32 [in]
    products,  # float64 [splits, out], written
    squares,  # float64 [splits, out], written
    outputs,
    channels_each,  # of one split, a multiple of CHANNELS
    sketch,
    span,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    tiles = tl.cdiv(span.n, OUTPUTS)
    group = tl.program_id(0) // tiles
    i = tl.program_id(0) % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    row = span.start + group * span.n + i
    product = tl.zeros((OUTPUTS,), tl.float64)
    square = tl.zeros((OUTPUTS,), tl.float64)
    last = tl.minimum((split + 1) * channels_each, sketch.num_active)
    for first in range(split * channels_each, last, CHANNELS):
        active_index = first + tl.arange(0, CHANNELS)
        held = active_index < sketch.num_active
        decoded = tl.trans(decoded_tile(sketch, span, active_index, i, group))  # [OUTPUTS, CHANNELS]
        channel = tl.load(sketch.channel + active_index, mask=held, other=0)
        place = weight + row.to(tl.int64)[:, None] * row_stride + channel.to(tl.int64)[None, :] * column_stride
        latent = tl.load(place, mask=(i < span.n)[:, None] & held[None, :], other=0.0).to(tl.float32)
        weighted = decoded * tl.load(second_moment + channel, mask=held, other=0.0)[None, :]
        product += tl.sum((weighted * latent).to(tl.float64), 1)
        square += tl.sum((weighted * decoded).to(tl.float64), 1)
    tl.store(products + split.to(tl.int64) * outputs + row, product, mask=i < span.n)
    tl.store(squares + split.to(tl.int64) * outputs + row, square, mask=i < span.n)


def output_sums(weight: Tensor, states: States, plan: Plan, second_moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`usllm.sketch.codec.output_sums`, float64 [out] each.

    Args:
        weight: [out, in], of any strides and float type.
        states: Of the plan, without output scales yet.
        plan: A plan with states.
        second_moment: E[a²] per input channel, [in]; ``None`` takes all as equal.
    """
    device, outputs = weight.device, plan.shape[0]
    known, sketch = sketch_argument(states, plan, output_scale=False)
    ones = torch.ones(plan.shape[1], dtype=torch.float32, device=device)
    of_channels = ones if second_moment is None else second_moment.float().contiguous()
    size = max(power_of_two(span.size, 16, 32) for span in known.spans)
    tiles = sum(span.groups * triton.cdiv(span.size, size) for span in known.spans)
    splits = max(min(_PROGRAMS // tiles, triton.cdiv(plan.num_active, 2 * _CHANNELS)), 1)
    each = triton.cdiv(triton.cdiv(plan.num_active, splits), _CHANNELS) * _CHANNELS
    splits = triton.cdiv(plan.num_active, each)
    products, squares = torch.empty(2, splits, outputs, dtype=torch.float64, device=device)
    for span in known.spans:
        output_sums_kernel[span.groups * triton.cdiv(span.size, size), splits](
            weight,
            *weight.stride(),
            of_channels,
            products,
            squares,
            outputs,
            each,
            sketch,
            groups_argument(span),
            CHANNELS=_CHANNELS,
            OUTPUTS=size,
            num_warps=4,
        )
    return products.sum(0), squares.sum(0)
