"""A plan's integers as the compiled loops read them: NumPy arrays, made once for each plan."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from usllm.sketch.plan import Plan
from usllm_kernels.cpu.lanes import LANES
from usllm_kernels.plan_cache import cached_by_plan
from usllm_kernels.tables import class_tables


class Layout(NamedTuple):
    """Tables of one plan.

    Attributes:
        lane_channels: Channels that lie side by side, int64 [lane blocks, 8]; unused lanes repeat the first.
        lane_block: Index of the class, lanes in use, first state, states per channel, active index of the first
            channel, first bit in the packed stream, bits a state; int64 [lane blocks, 7].
        class_sizes: Channels, first state, states per channel, bits of each class, int64 [classes, 4].
        shapes: For each span: rows, depth, states, offsets in slots and buckets, first state within a channel of each
            class, int64 [classes, 6].
        slots: For each span: members of the buckets of all classes, uint16.
        buckets: For each span: bucket of each rotated position, row r's from r * K on, uint16.
    """

    lane_channels: Any
    lane_block: Any
    class_sizes: Any
    shapes: list[Any]
    slots: list[Any]
    buckets: list[Any]


@cached_by_plan
def layout(plan: Plan) -> Layout:
    """The tables of a plan with states."""
    channels, blocks = [], []
    active_index = bit = 0
    for class_index, block in enumerate(plan.blocks):
        first, bits, each = block.first_state, block.choice.bits, block.states_per_channel
        for of_part in block.channels.split(LANES):
            lanes = len(of_part)
            channels.append(torch.cat([of_part, of_part[:1].expand(LANES - lanes)]))
            blocks.append((class_index, lanes, first, each, active_index, bit, bits))
            active_index, first, bit = active_index + lanes, first + lanes * each, bit + lanes * each * bits
    per_class = [(len(b.channels), b.first_state, b.states_per_channel, b.choice.bits) for b in plan.blocks]
    spans = [class_tables(plan, span_index) for span_index in range(len(plan.spans))]
    return Layout(
        torch.stack(channels).numpy(),
        torch.tensor(blocks).numpy(),
        torch.tensor(per_class).numpy(),
        [shape.long().numpy() for shape, _, _ in spans],
        # Unsigned: an index that could be below zero would be checked for it at every use.
        [slots.numpy().view("uint16") for _, slots, _ in spans],
        [buckets.numpy().view("uint16") for _, _, buckets in spans],
    )
