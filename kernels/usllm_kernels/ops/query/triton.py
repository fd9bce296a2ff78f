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
from usllm_kernels.compiled_operators import supports
from usllm_kernels.launch import groups_argument, power_of_two, sketch_argument, target
from usllm_kernels.triton_tile import as_stored, decoded_tile

__all__ = ["query", "query_groups", "supports"]


@triton.jit
def query_kernel(
    out,  # [rows, columns], written
    pitch,  # elements from one of its rows to the next
    columns,
    first_group,  # of those to decode, within the span
    first_active,  # index of the first channel to decode, if COMPACT
    active_index_of,  # int32 [in], -1 for channels without states
    sketch,
    span,
    COMPACT: tl.constexpr,  # whether columns are the channels that hold states alone
    BFLOAT16: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    parts = tl.cdiv(span.n, OUTPUTS)
    group = first_group + tl.program_id(1) // parts
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.program_id(1) % parts * OUTPUTS + tl.arange(0, OUTPUTS)
    if COMPACT:
        active_index = first_active + column
    else:
        active_index = tl.load(active_index_of + column, mask=column < columns, other=-1)
    weight = decoded_tile(sketch, span, active_index, i, group)  # [CHANNELS, OUTPUTS]
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
    for span_index, span in enumerate(plan.spans):
        rows = decoded[span.start : span.start + span.groups * span.size]
        query_groups(states, plan, span_index, range(span.groups), rows, output_scale=output_scale)
    return decoded


def query_groups(
    states: States,
    plan: Plan,
    span_index: int,
    groups: range,
    decoded: Tensor,
    active: range | None = None,
    *,
    output_scale: bool = True,
) -> None:
    """Decode some groups of one span.

    Args:
        states: Of the plan.
        plan: A plan with states.
        span_index: Of the span.
        groups: Which of its groups.
        decoded: [rows, columns], rows contiguous, written from its first row on.
        active: Which of the channels that hold states, in storage order, the columns are; ``None``: all channels of the
            layer, in its order.
        output_scale: Whether to apply output scales, if the plan has them.
    """
    known, sketch = sketch_argument(states, plan, output_scale=output_scale)
    span, columns = known.spans[span_index], decoded.shape[1]
    parameters = launch_parameters("query", decoded.device)
    channels, outputs = parameters["channels"], power_of_two(span.size, 16, parameters["outputs"])
    query_kernel[triton.cdiv(columns, channels), len(groups) * triton.cdiv(span.size, outputs)](
        **target(decoded),
        pitch=decoded.stride(0),
        columns=columns,
        first_group=groups.start,
        first_active=active.start if active is not None else 0,
        active_index_of=known.active_index_of,
        sketch=sketch,
        span=groups_argument(span),
        COMPACT=active is not None,
        CHANNELS=channels,
        OUTPUTS=outputs,
        num_warps=parameters["num_warps"],
    )
