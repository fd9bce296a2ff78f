"""Squared error and energy of every channel on CUDA, without a decoded weight or any other copy of the layer."""

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

_CHANNELS = 32  # float32 fill a line


@triton.jit
def error_sums_kernel(
    weight,  # [out, in], any float type
    row_stride,
    column_stride,
    parts,  # float32 [groups of all spans, 2, in], written
    first_part,  # of the span
    active_index_of,  # int32 [in], -1 for channels without states
    sketch,
    span,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    group = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < sketch.width
    active_index = tl.load(active_index_of + channel, mask=inside, other=-1)
    error = tl.zeros((CHANNELS,), tl.float32)
    energy = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, span.n, OUTPUTS):
        i = first + tl.arange(0, OUTPUTS)
        decoded = tl.trans(decoded_tile(sketch, span, active_index, i, group))  # [OUTPUTS, CHANNELS]
        row = (span.start + group * span.n + i).to(tl.int64)
        place = weight + row[:, None] * row_stride + channel.to(tl.int64)[None, :] * column_stride
        latent = tl.load(place, mask=(i < span.n)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        difference = decoded - latent
        error += tl.sum(difference * difference, 0)
        energy += tl.sum(latent * latent, 0)
    place = parts + (first_part + group).to(tl.int64) * 2 * sketch.width + channel
    tl.store(place, error, mask=inside)
    tl.store(place + sketch.width, energy, mask=inside)


def error_sums(weight: Tensor, states: States, plan: Plan) -> Tensor:
    """Over the outputs, the squared error of the decoded weight, and the squared weight, fp32 [2, in].

    Args:
        weight: [out, in], of any strides and float type.
        states: Of the plan.
        plan: A plan with states.
    """
    known, sketch = sketch_argument(states, plan)
    width = plan.shape[1]
    groups = sum(span.groups for span in known.spans)
    parts = torch.empty(groups, 2, width, dtype=torch.float32, device=weight.device)
    first = 0
    for span in known.spans:
        error_sums_kernel[triton.cdiv(width, _CHANNELS), span.groups](
            weight,
            *weight.stride(),
            parts,
            first,
            known.active_index_of,
            sketch,
            groups_argument(span),
            CHANNELS=_CHANNELS,
            OUTPUTS=power_of_two(span.size, 16, 32),
            num_warps=4,
        )
        first += span.groups
    return parts.sum(0)
