"""A plan's integers as the Triton kernels read them: tensors on the device, made once a plan and device."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from usllm.sketch.plan import Plan
from usllm.sketch.quantize import BEST_SCALE, EXPONENTIAL_RATIO, HEAVY_SLOPE, NORMAL_RATIO
from usllm_kernels.plan_cache import cached_by_plan

CLASS_COLUMNS = 6  # of ``shape``


class SpanTables(NamedTuple):
    """Tables of one run of groups.

    Attributes:
        start, size, groups, rotation: Of the span; the rotation is that of channel 0 in its first group.
        shape: Rows, depth, states, offsets in slots and buckets, first state within a channel; int32 [classes, 6].
        slots: Positions that share each bucket, [rows, depth, states] of every class, one after another, int16; n where
            unused.
        buckets: Bucket of each rotated position, row r's from r * K on, [rows, n] of every class, one after another;
            the bits of uint16, held as int16.
    """

    start: int
    size: int
    groups: int
    rotation: int
    shape: Tensor
    slots: Tensor
    buckets: Tensor


class Tables(NamedTuple):
    """Tables of a plan. A channel that holds states is active; its index counts these in storage order.

    Storage order is by class, then by channel.

    Attributes:
        active_index_of: Index of each channel, -1 for channels without states, int32 [in].
        channel: Channel of each index, int32 [active channels].
        class_index: Class of each active channel, int32; it counts the classes that hold states.
        first_state: First state of each active channel, int64.
        sizes: States of each active channel, int32.
        bits: Width of the states of each active channel, int32.
        first_bit: Where its states begin in the packed stream, in bits, int64.
        rows, states, depth: The most over all classes.
        spans: The runs of groups.
    """

    active_index_of: Tensor
    channel: Tensor
    class_index: Tensor
    first_state: Tensor
    sizes: Tensor
    bits: Tensor
    first_bit: Tensor
    rows: int
    states: int
    depth: int
    spans: list[SpanTables]


@cached_by_plan
def tables(plan: Plan, device: torch.device) -> Tables:
    """The tables of a plan with states."""
    blocks = plan.blocks
    first_state, first_bit = [], []
    bit = 0
    for block in blocks:
        index = torch.arange(len(block.channels))
        first_state.append(block.first_state + index * block.states_per_channel)
        first_bit.append(bit + index * block.states_per_channel * block.choice.bits)
        bit += block.num_states * block.choice.bits
    active_index_of = torch.full((plan.shape[1],), -1, dtype=torch.int32)
    active_index_of[plan.channel_order] = torch.arange(plan.num_active, dtype=torch.int32)
    spans = [_span(plan, span_index, device) for span_index in range(len(plan.spans))]
    shapes = torch.cat([span.shape.cpu() for span in spans])
    return Tables(
        active_index_of.to(device),
        plan.channel_order.int().to(device),
        plan.per_channel(range(len(blocks))).to(device),
        torch.cat(first_state).to(device),
        plan.per_channel([block.states_per_channel for block in blocks]).to(device),
        plan.per_channel([block.choice.bits for block in blocks]).to(device),
        torch.cat(first_bit).to(device),
        int(shapes[:, 0].max()),
        int(shapes[:, 2].max()),
        int(shapes[:, 1].max()),
        spans,
    )


def _span(plan: Plan, span_index: int, device: torch.device) -> SpanTables:
    span = plan.spans[span_index]
    of_classes = (values.to(device) for values in class_tables(plan, span_index))
    return SpanTables(span.start, span.size, span.groups, plan.rotation(span), *of_classes)


def class_tables(plan: Plan, span_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """``shape``, ``slots`` and ``buckets`` of :class:`SpanTables` for one span."""
    span = plan.spans[span_index]
    shape, slots, buckets = [], [], []
    slot_offset = bucket_offset = 0
    for block in plan.blocks:
        choice = block.choice
        before = sum(s.groups * choice.rows * min(choice.states, s.size) for s in plan.spans[:span_index])
        placement = plan.placement(choice, span.size)
        rows, _, states = placement.slots.shape
        shape.append((*placement.slots.shape, slot_offset, bucket_offset, before))
        slots.append(placement.slots.flatten())
        counted = placement.buckets.int() + states * torch.arange(rows, dtype=torch.int32)[:, None]
        buckets.append(counted.to(torch.int16).flatten())
        slot_offset += slots[-1].numel()
        bucket_offset += buckets[-1].numel()
    return torch.tensor(shape, dtype=torch.int32), torch.cat(slots), torch.cat(buckets)


@lru_cache(maxsize=16)
def best_scales(rounding: str, device: torch.device) -> Tensor:
    """The clipping scale of every width as a factor of the mean magnitude.

    Returns:
        float32 [17, 2]: by width in bits, the factor for normal magnitudes, and the increment to that for exponential
        ones. 0 where nothing is clipped.
    """
    table = torch.zeros(17, 2, dtype=torch.float32)
    for (of_rounding, bits), (normal, exponential) in BEST_SCALE.items():
        if of_rounding == rounding:
            table[bits] = torch.tensor((normal, exponential - normal), dtype=torch.float32)
    return table.to(device)


@lru_cache(maxsize=8)
def scale_ratios(device: torch.device) -> Tensor:
    """rms / mean of normal magnitudes, the increment to that of exponential ones, slope beyond; float32 [3]."""
    ratios = NORMAL_RATIO, EXPONENTIAL_RATIO - NORMAL_RATIO, HEAVY_SLOPE
    return torch.tensor(ratios, dtype=torch.float32).to(device)
