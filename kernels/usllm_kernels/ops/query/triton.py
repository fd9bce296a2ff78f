"""Query on CUDA: states, packed or not -> decoded weight."""

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
from usllm_kernels.launch import groups_argument, power_of_two, sketch_argument, target
from usllm_kernels.triton_tile import as_stored, decoded_tile


@triton.jit
def query_kernel(
    out,  # [rows, columns], written
    pitch,  # elements from one of its rows to the next
    columns,
    first_group,  # of those to decode, within the span
    first_number,  # of those to decode, if COMPACT
    position,  # int32 [in]: number of each channel, -1 without states
    sketch,
    span,
    COMPACT: tl.constexpr,  # whether columns are numbers, not channels
    BFLOAT16: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    parts = tl.cdiv(span.n, OUTPUTS)
    group = first_group + tl.program_id(1) // parts
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.program_id(1) % parts * OUTPUTS + tl.arange(0, OUTPUTS)
    if COMPACT:
        number = first_number + column
    else:
        number = tl.load(position + column, mask=column < columns, other=-1)
    weight = decoded_tile(sketch, span, number, i, group)  # [CHANNELS, OUTPUTS]
    row = ((group - first_group) * span.n + i).to(tl.int64)
    place = out + row[:, None] * pitch + column[None, :]
    value = as_stored(tl.trans(weight), BFLOAT16, out.dtype.element_ty)
    tl.store(place, value, mask=(i < span.n)[:, None] & (column < columns)[None, :])


def query(states: States, plan: Plan, dtype: torch.dtype = torch.float32, *, output_scale: bool = True) -> Tensor:
    """Decoded weight [out, in], with output scales if wanted; ``codes`` may be the packed stream, uint8."""
    device = states["codes"].device
    if not plan.blocks:
        return torch.zeros(plan.shape, dtype=dtype, device=device)
    decoded = torch.empty(plan.shape, dtype=dtype, device=device)
    for number, span in enumerate(plan.spans):
        rows = decoded[span.start : span.start + span.groups * span.size]
        query_groups(states, plan, number, range(span.groups), rows, output_scale=output_scale)
    return decoded


def query_groups(
    states: States,
    plan: Plan,
    span_number: int,
    groups: range,
    decoded: Tensor,
    numbers: range | None = None,
    *,
    output_scale: bool = True,
) -> None:
    """Decode some groups of one span.

    Args:
        states: Of the plan.
        plan: A plan with states.
        span_number: Of the span.
        groups: Which of its groups.
        decoded: [rows, columns], rows contiguous, written from its first row on.
        numbers: Which channels with states, in storage order, go to the columns; ``None``: all channels in theirs.
        output_scale: Whether to apply output scales, if the plan has them.
    """
    known, sketch = sketch_argument(states, plan, output_scale=output_scale)
    span, columns = known.spans[span_number], decoded.shape[1]
    parameters = launch_parameters("query", decoded.device)
    channels, outputs = parameters["channels"], power_of_two(span.size, 16, parameters["outputs"])
    query_kernel[triton.cdiv(columns, channels), len(groups) * triton.cdiv(span.size, outputs)](
        **target(decoded),
        pitch=decoded.stride(0),
        columns=columns,
        first_group=groups.start,
        first_number=numbers.start if numbers is not None else 0,
        position=known.position,
        sketch=sketch,
        span=groups_argument(span),
        COMPACT=numbers is not None,
        CHANNELS=channels,
        OUTPUTS=outputs,
        num_warps=parameters["num_warps"],
    )
