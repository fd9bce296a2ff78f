"""A plan's integers as the Triton kernels read them: tensors on the device, made once a plan and device."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from usllm.sketch.plan import Plan
from usllm.sketch.quantize import BEST_SCALE, EXPONENTIAL_RATIO, HEAVY_SLOPE, NORMAL_RATIO

SHAPE_COLUMNS = 6


class SpanTables(NamedTuple):
    """Tables of one run of groups.

    Attributes:
        start, size, groups, rotation: Of the span; the rotation is that of channel 0 in its first group.
        shape: Rows, depth, states, offsets in slots and buckets, first state within a channel; int32 [classes, 6].
        slots: Positions that share each bucket, [rows, depth, states] of every class in turn, int16; n where unused.
        buckets: Bucket of each rotated position, counted on from row to row, [rows, n] of every class in turn; the bits
            of uint16, held as int16.
    """

    start: int
    size: int
    groups: int
    rotation: int
    shape: Tensor
    slots: Tensor
    buckets: Tensor


class Tables(NamedTuple):
    """Tables of a plan. Channels with states are also numbered in storage order: by class, then by channel.

    Attributes:
        position: Number in storage order of each channel, -1 without states, int32 [in].
        channel: Channel of each number, int32 [channels with states].
        block: Class of each number, int32.
        first_state: First state of each number, int64.
        sizes: States of each number, int32.
        bits: Width of the states of each number, int32.
        first_bit: Where its states begin in the packed stream, in bits, int64.
        rows, states, depth: The most over all classes.
        spans: The runs of groups.
    """

    position: Tensor
    channel: Tensor
    block: Tensor
    first_state: Tensor
    sizes: Tensor
    bits: Tensor
    first_bit: Tensor
    rows: int
    states: int
    depth: int
    spans: list[SpanTables]


def tables(plan: Plan, device: torch.device) -> Tables:
    """The tables of a plan with states."""
    kept: dict[torch.device, Tables] = plan.__dict__.setdefault("_device_tables", {})
    if device not in kept:
        kept[device] = _tables(plan, device)
    return kept[device]


def _tables(plan: Plan, device: torch.device) -> Tables:
    blocks = plan.blocks
    first_state, first_bit = [], []
    bit = 0
    for block in blocks:
        number = torch.arange(len(block.channels))
        first_state.append(block.first_state + number * block.states_per_channel)
        first_bit.append(bit + number * block.states_per_channel * block.choice.bits)
        bit += block.num_states * block.choice.bits
    position = torch.full((plan.shape[1],), -1, dtype=torch.int32)
    position[plan.channel_order] = torch.arange(plan.num_scales, dtype=torch.int32)
    spans = [_span(plan, number, device) for number in range(len(plan.spans))]
    shapes = torch.cat([span.shape.cpu() for span in spans])
    return Tables(
        position.to(device),
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


def _span(plan: Plan, number: int, device: torch.device) -> SpanTables:
    span = plan.spans[number]
    of_classes = (values.to(device) for values in class_tables(plan, number))
    return SpanTables(span.start, span.size, span.groups, plan.rotation(span), *of_classes)


def class_tables(plan: Plan, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """``shape``, ``slots`` and ``buckets`` of :class:`SpanTables` for one span."""
    span = plan.spans[number]
    shape, slots, buckets = [], [], []
    slot_offset = bucket_offset = 0
    for block in plan.blocks:
        choice = block.choice
        before = sum(s.groups * choice.rows * min(choice.states, s.size) for s in plan.spans[:number])
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
    """Factors of the mean by width, for normal magnitudes and what exponential ones have more; 0 where nothing clips.

    Returns:
        float32 [17, 2].
    """
    table = torch.zeros(17, 2)
    for (of_rounding, bits), (normal, exponential) in BEST_SCALE.items():
        if of_rounding == rounding:
            table[bits] = torch.tensor((normal, exponential - normal))
    return table.to(device)


@lru_cache(maxsize=8)
def scale_ratios(device: torch.device) -> Tensor:
    """rms over mean of normal magnitudes, what exponential ones have more, slope beyond; float32 [3]."""
    return torch.tensor((NORMAL_RATIO, EXPONENTIAL_RATIO - NORMAL_RATIO, HEAVY_SLOPE)).to(device)
