"""A plan's integers as the compiled loops read them: NumPy arrays, made once a plan."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from usllm.sketch.plan import Plan
from usllm_kernels.cpu.lanes import LANES


class Layout(NamedTuple):
    """Tables of one plan.

    Attributes:
        lane_channels: Channels that lie side by side, int64 [lane blocks, 8]; unused lanes repeat the first.
        lane_block: Class, lanes in use, first state, states per channel, int64 [lane blocks, 4].
        channel_block: Channels, first state, states per channel, bits of each class, int64 [classes, 4].
        shapes: For each span: rows, depth, states, offsets in slots and buckets, first state within a channel of each
            class, int64 [classes, 6].
        slots: For each span: members of the buckets of all classes, uint16.
        buckets: For each span: bucket of each rotated position, counted on from row to row, uint16.
    """

    lane_channels: Any
    lane_block: Any
    channel_block: Any
    shapes: list[Any]
    slots: list[Any]
    buckets: list[Any]


def layout(plan: Plan) -> Layout:
    """The tables of a plan, kept with it."""
    kept: Layout | None = plan.__dict__.get("_cpu_layout")
    if kept is None:
        kept = plan.__dict__["_cpu_layout"] = _layout(plan)
    return kept


def _layout(plan: Plan) -> Layout:
    channels, blocks = [], []
    for number, block in enumerate(plan.blocks):
        for part, of_part in enumerate(block.channels.split(LANES)):
            first = block.first_state + part * LANES * block.states_per_channel
            channels.append(torch.cat([of_part, of_part[:1].expand(LANES - len(of_part))]))
            blocks.append((number, len(of_part), first, block.states_per_channel))
    per_class = [(len(b.channels), b.first_state, b.states_per_channel, b.choice.bits) for b in plan.blocks]
    spans = [_span(plan, number) for number in range(len(plan.spans))]
    return Layout(
        torch.stack(channels).numpy(),
        torch.tensor(blocks).numpy(),
        torch.tensor(per_class).numpy(),
        *(list(column) for column in zip(*spans, strict=True)),
    )


def _span(plan: Plan, number: int) -> tuple[Any, Any, Any]:
    span = plan.spans[number]
    shape, slots, buckets = [], [], []
    slot_offset = bucket_offset = 0
    for block in plan.blocks:
        choice = block.choice
        before = sum(s.groups * choice.rows * min(choice.states, s.size) for s in plan.spans[:number])
        placement = plan.placement(choice, span.size)
        rows, depth, states = placement.slots.shape
        shape.append((rows, depth, states, slot_offset, bucket_offset, before))
        slots.append(placement.slots.flatten())
        buckets.append((placement.buckets.int() + states * torch.arange(rows)[:, None]).flatten())
        slot_offset += slots[-1].numel()
        bucket_offset += buckets[-1].numel()
    # Unsigned: an index that could be below zero would be checked for it at every use.
    return (
        torch.tensor(shape).numpy(),
        torch.cat(slots).numpy().view("uint16"),
        torch.cat(buckets).numpy().astype("uint16"),
    )
