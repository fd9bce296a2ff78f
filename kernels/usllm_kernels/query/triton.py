"""Query on CUDA: states, packed or not -> decoded weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.launch import decoding, of_span, power_of_two, target
from usllm_kernels.tile import as_stored, decoded_tile


@triton.jit
def query_kernel(
    out,  # [rows, in], written
    first_group,  # of those to decode, within the span
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
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    parts = tl.cdiv(n, OUTPUTS)
    group = first_group + tl.program_id(1) // parts
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.program_id(1) % parts * OUTPUTS + tl.arange(0, OUTPUTS)
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
    row = ((group - first_group) * n + i).to(tl.int64)
    place = out + row[:, None] * width + channel[None, :]
    value = as_stored(tl.trans(weight), BFLOAT16, out.dtype.element_ty)
    tl.store(place, value, mask=(i < n)[:, None] & (channel < width)[None, :])


def query(states: States, plan: Plan, dtype: torch.dtype = torch.float32, *, output_scale: bool = True) -> Tensor:
    """Decoded weight [out, in], with output scales if wanted; ``codes`` may be the packed stream, uint8."""
    device = states["codes"].device
    if not plan.blocks:
        return torch.zeros(plan.shape, dtype=dtype, device=device)
    decoded = torch.empty(plan.shape, dtype=dtype, device=device)
    for number, span in enumerate(plan.spans):
        rows = decoded[span.start : span.start + span.groups * span.size]
        query_groups(states, plan, number, 0, span.groups, rows, output_scale=output_scale)
    return decoded


def query_groups(
    states: States,
    plan: Plan,
    number: int,
    first_group: int,
    groups: int,
    decoded: Tensor,
    *,
    output_scale: bool = True,
) -> None:
    """Decode some groups of one span into ``decoded`` [rows, in], contiguous.

    Args:
        states: Of the plan.
        plan: A plan with states.
        number: Of the span.
        first_group: The first of these groups, within the span.
        groups: How many.
        decoded: Written from its first row on.
        output_scale: Whether to apply output scales, if the plan has them.
    """
    known, arguments = decoding(states, plan)
    arguments["OUTPUT_SCALE"] &= output_scale
    width, span = plan.shape[1], known.spans[number]
    channels, outputs = 32, power_of_two(span.size, 16, 128)  # 32 float32 fill a cache line
    query_kernel[triton.cdiv(width, channels), groups * triton.cdiv(span.size, outputs)](
        **target(decoded),
        first_group=first_group,
        **arguments,
        **of_span(span),
        CHANNELS=channels,
        OUTPUTS=outputs,
        num_warps=4,
    )
