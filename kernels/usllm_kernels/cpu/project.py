"""Compiled loops of projection: a span's weights -> values of its states, before quantisation.

In hash order, all channels of a class look into the same table. Eight of them lie side by side: a bucket's minimum is
a minimum of rows of eight, and a table entry is read once for eight weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from usllm_kernels.compiled_operators import MEAN, MINIMUM
from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.lanes import LANES, add, divide, fill, load, minimum, store, where_less
from usllm_kernels.cpu.tiles import encode_element, encode_tile, gather_tile

_STRIP = 512  # channels that are transposed together: their half-written lines stay in the second-level cache


@compiled
def project_span(
    weight: Any,  # int32 (bit patterns, for MINIMUM) or float32, flat
    pitch: int,  # elements from one output row to the next
    width: int,  # input channels
    start: int,  # output row of the first of these groups
    n: int,
    first_group: int,  # of those to project, within the span
    groups: int,
    rotation: int,  # of channel 0 in the span's first group
    rotation_step: int,  # how much further the next channel is rotated, 0 or 1
    reduction: int,  # see :mod:`usllm_kernels.compiled_operators`
    lane_channels: Any,  # int64 [lane blocks, 8]
    lane_block: Any,  # int64 [lane blocks, 7] (:mod:`usllm_kernels.cpu.layout`)
    shape: Any,  # int64 [classes, 6]: rows, depth, states, offsets in slots and buckets, first state in a channel
    slots: Any,  # uint16: [rows, depth, states] of every class
    pad: Any,  # what unused slots hold, of the weight's type
    values: Any,  # [states] of the weight's type, written
    winners: Any,  # int16 [states], written, or empty
) -> None:
    """Value of every state in one span, and the position of the member that it keeps."""
    columns = np.empty((width, n + LANES), weight.dtype)
    largest = 0
    for class_index in range(shape.shape[0]):
        largest = max(largest, shape[class_index, 0] * shape[class_index, 2])
    members = np.empty((n + LANES, LANES), weight.dtype)
    reduced = np.empty((largest, LANES), weight.dtype)
    kept = np.empty((largest, LANES), np.int32)
    places = np.empty(LANES, np.int64)
    for group in range(first_group, first_group + groups):
        by_channel(weight, pitch, width, start + (group - first_group) * n, n, columns)
        of_group = rotation + rotation_step * group * width
        for block in range(lane_block.shape[0]):
            class_index, lanes, first = lane_block[block, 0], lane_block[block, 1], lane_block[block, 2]
            rows, depth, states = shape[class_index, 0], shape[class_index, 1], shape[class_index, 2]
            interleave(columns, lane_channels[block], of_group, rotation_step, n, places, members)
            store(members, n * LANES, fill(members, pad))
            table = slots[shape[class_index, 3] : shape[class_index, 3] + rows * depth * states]
            if winners.size:
                _reduce_with_winners(members, table, rows, depth, states, n, pad, reduced, kept)
            elif reduction == MINIMUM:
                _reduce_minimum(members, table, rows, depth, states, reduced)
            else:
                _reduce_sum(members, table, rows, depth, states, n, reduction == MEAN, reduced)
            place = first + shape[class_index, 5] + group * rows * states
            for lane in range(lanes):
                for k in range(rows * states):
                    values[place + k] = reduced[k, lane]
                if winners.size:
                    for k in range(rows * states):
                        winners[place + k] = np.int16(kept[k, lane])
                place += lane_block[block, 3]


@compiled
def by_channel(weight: Any, pitch: int, width: int, start: int, n: int, columns: Any) -> None:
    """A group's weights by channel, encoded; the first eight are repeated after the last, for reads that wrap."""
    step = n + LANES
    whole = n // LANES * LANES
    for first in range(0, width, _STRIP):
        last = min(first + _STRIP, width)
        full = first + (last - first) // LANES * LANES
        for i in range(0, whole, LANES):
            for channel in range(first, full, LANES):
                encode_tile(weight, (start + i) * pitch + channel, pitch, columns, channel * step + i, step)
        for channel in range(first, last):
            for i in range(whole if channel < full else 0, n):
                columns[channel, i] = encode_element(weight, (start + i) * pitch + channel)
            for i in range(LANES):
                columns[channel, n + i] = columns[channel, i]


@compiled
def interleave(
    columns: Any, channels: Any, of_group: int, rotation_step: int, n: int, places: Any, members: Any
) -> None:
    """Eight channels side by side in hash order: row q of ``members`` holds position q + rotation of each.

    ``of_group`` is the rotation of channel 0 in this group.
    """
    for lane in range(LANES):
        places[lane] = (of_group + rotation_step * channels[lane]) % n
    for q in range(0, n, LANES):
        for lane in range(LANES):
            places[lane] += channels[lane] * (n + LANES)
        gather_tile(columns, places, members, q * LANES, LANES)
        for lane in range(LANES):
            place = places[lane] - channels[lane] * (n + LANES) + LANES
            places[lane] = place - n if place >= n else place


@compiled
def _reduce_minimum(members: Any, table: Any, rows: int, depth: int, states: int, reduced: Any) -> None:
    for row in range(rows):
        for k in range(states):
            place = row * depth * states + k
            least = load(members, np.intp(table[place]) * LANES)
            for _ in range(depth - 1):
                place += states
                least = minimum(least, load(members, np.intp(table[place]) * LANES))
            store(reduced, (row * states + k) * LANES, least)


@compiled
def _reduce_with_winners(
    members: Any, table: Any, rows: int, depth: int, states: int, n: int, pad: Any, reduced: Any, kept: Any
) -> None:
    for row in range(rows):
        for k in range(states):
            place = row * depth * states + k
            least, position = fill(members, pad), fill(kept, 0)
            for _ in range(depth):
                value = load(members, np.intp(table[place]) * LANES)
                position = where_less(value, least, fill(kept, table[place]), position)
                least = minimum(value, least)
                place += states
            store(reduced, (row * states + k) * LANES, least)
            store(kept, (row * states + k) * LANES, position)


@compiled
def _reduce_sum(members: Any, table: Any, rows: int, depth: int, states: int, n: int, mean: bool, reduced: Any) -> None:
    for row in range(rows):
        for k in range(states):
            place = row * depth * states + k
            total = load(members, np.intp(table[place]) * LANES)
            held = 1 if table[place] < n else 0
            for _ in range(depth - 1):
                place += states
                total = add(total, load(members, np.intp(table[place]) * LANES))
                held += 1 if table[place] < n else 0
            if mean:
                total = divide(total, fill(members, max(held, 1)))
            store(reduced, (row * states + k) * LANES, total)
