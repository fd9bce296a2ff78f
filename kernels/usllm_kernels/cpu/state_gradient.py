"""The states' gradient on the CPU, compiled: what :mod:`usllm.sketch.state_gradient` computes, group by group.

A group's gradients are brought into hash order as its weights are for a projection, averaged by bucket, read back as
codes are for a query, and written where they came from: nothing as large as a layer is made besides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from usllm.sketch.codec import States, check_shape
from usllm.sketch.plan import Plan
from usllm_kernels.compiled_operators import MAGNITUDE_MAX, MAGNITUDE_MIN, TOTAL, combination
from usllm_kernels.cpu.codec import flat_view, tasks, unpacked
from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.lanes import LANES, add, divide, fill, load, store
from usllm_kernels.cpu.layout import layout
from usllm_kernels.cpu.parallel import side_by_side
from usllm_kernels.cpu.project import by_channel, interleave
from usllm_kernels.cpu.query import gather_candidates, straighten
from usllm_kernels.cpu.tiles import encode_tile

_STRIP = 256  # channels that are written together


def state_gradient_(gradient: Tensor, plan: Plan, states: States) -> None:
    """:func:`usllm.sketch.state_gradient.state_gradient_` of an fp32 gradient, in place."""
    check_shape(gradient, plan)
    if not plan.blocks:
        gradient.zero_()
        return
    flat, pitch = flat_view(gradient)  # of a copy, where rows are not contiguous
    tables, codes = layout(plan), unpacked(states, plan)

    def work(task: tuple[int, int, int]) -> None:
        span_index, first, groups = task
        span = plan.spans[span_index]
        spread_span(
            flat.numpy(),
            pitch,
            plan.shape[1],
            span.start + first * span.size,
            span.size,
            first,
            groups,
            plan.rotation(span),
            plan.rotation_step,
            combination(plan),
            codes.numpy(),
            tables.lane_channels,
            tables.lane_block,
            tables.shapes[span_index],
            tables.slots[span_index],
            tables.buckets[span_index],
        )

    side_by_side(work, tasks(plan, torch.get_num_threads() > 1))
    if flat.data_ptr() != gradient.data_ptr():
        gradient.copy_(flat.view(plan.shape))


@compiled
def spread_span(
    gradient: Any,  # float32 flat, overwritten
    pitch: int,  # elements from one output row to the next
    width: int,  # input channels
    start: int,  # output row of the first of these groups
    n: int,
    first_group: int,  # of those to do, within the span
    groups: int,
    rotation: int,  # of channel 0 in the span's first group
    rotation_step: int,  # how much further the next channel is rotated, 0 or 1
    combination: int,  # see :mod:`usllm_kernels.compiled_operators`
    codes: Any,  # int8 or int16 [states]
    lane_channels: Any,  # int64 [lane blocks, 8]
    lane_block: Any,  # int64 [lane blocks, 7] (:mod:`usllm_kernels.cpu.layout`)
    shape: Any,  # int64 [classes, 6]: rows, depth, states, offsets in slots and buckets, first state in a channel
    slots: Any,  # uint16: [rows, depth, states] of every class
    buckets: Any,  # uint16: [rows, n] of every class, row r's from r * K on
) -> None:
    """One span's gradients, each replaced by that of its states."""
    columns = np.empty((width, n + LANES), np.float32)
    panel = np.zeros((width, n + LANES), np.float32)  # channels without states stay at 0
    largest, rows_at_most = LANES, 1
    for class_index in range(shape.shape[0]):
        largest = max(largest, shape[class_index, 0] * shape[class_index, 2])
        rows_at_most = max(rows_at_most, shape[class_index, 0])
    members = np.empty((n + LANES, LANES), np.float32)
    asked = np.empty((n + 1, LANES), np.float32)
    means = np.empty((largest, LANES), np.float32)
    best = np.empty((n + LANES, LANES), np.float32)
    candidates = np.zeros((largest + LANES, LANES), codes.dtype)
    taken = np.zeros((n, LANES), np.int8)
    places = np.empty(LANES, np.int64)
    for group in range(first_group, first_group + groups):
        row = start + (group - first_group) * n
        by_channel(gradient, pitch, width, row, n, columns)
        of_group = rotation + rotation_step * group * width
        for block in range(lane_block.shape[0]):
            class_index, lanes, first = lane_block[block, 0], lane_block[block, 1], lane_block[block, 2]
            rows, depth, states = shape[class_index, 0], shape[class_index, 1], shape[class_index, 2]
            slot_table, bucket_table = shape[class_index, 3], shape[class_index, 4]
            interleave(columns, lane_channels[block], of_group, rotation_step, n, places, members)
            store(members, n * LANES, fill(members, np.float32(0.0)))
            if rows > 1 and combination != TOTAL:
                first += shape[class_index, 5] + group * rows * states
                gather_candidates(codes, first, lanes, lane_block[block, 3], rows * states, places, candidates)
                find_taken(candidates, buckets, bucket_table, rows, n, combination, taken)
                for r in range(rows):
                    for q in range(n):
                        for lane in range(LANES):
                            asked[q, lane] = members[q, lane] if taken[q, lane] == r else np.float32(0.0)
                    store(asked, n * LANES, fill(asked, np.float32(0.0)))
                    bucket_means(asked, slots, slot_table, r, depth, states, n, 1, means)
            else:
                for r in range(rows):
                    bucket_means(members, slots, slot_table, r, depth, states, n, rows, means)
            for q in range(n):
                total = load(means, np.intp(buckets[np.uint64(bucket_table + q)]) * LANES)
                for r in range(1, rows):
                    total = add(total, load(means, np.intp(buckets[np.uint64(bucket_table + r * n + q)]) * LANES))
                store(best, q * LANES, total)
            for i in range(LANES):  # tiles that cross the end continue at the beginning
                best[n + i] = best[i]
            straighten(best, lane_channels[block], of_group, rotation_step, n, places, panel)
        write_back(panel, n, row, pitch, width, gradient)


@compiled
def find_taken(candidates: Any, buckets: Any, table: int, rows: int, n: int, combination: int, taken: Any) -> None:
    """The row that the query takes at every position; of equal candidates the first."""
    for q in range(n):
        for lane in range(LANES):
            code = np.int64(candidates[buckets[np.uint64(table + q)], lane])
            best, found = code, 0
            for row in range(1, rows):
                code = np.int64(candidates[buckets[np.uint64(table + row * n + q)], lane])
                size, least = abs(code), abs(best)
                if combination == MAGNITUDE_MAX:  # of equal magnitudes the negative one
                    better = size > least or (size == least and code < best)
                elif combination == MAGNITUDE_MIN:
                    better = size < least
                else:
                    better = code > best
                if better:
                    best, found = code, row
            taken[q, lane] = found


@compiled
def bucket_means(
    asked: Any, slots: Any, table: int, row: int, depth: int, states: int, n: int, divisor: int, means: Any
) -> None:
    """Mean over the members of every bucket of one row, over ``divisor``; one after another, as the reference adds."""
    for k in range(states):
        place = table + row * depth * states + k
        total, held = load(asked, np.intp(slots[np.uint64(place)]) * LANES), 1 if slots[np.uint64(place)] < n else 0
        for _ in range(depth - 1):
            place += states
            total = add(total, load(asked, np.intp(slots[np.uint64(place)]) * LANES))
            held += 1 if slots[np.uint64(place)] < n else 0
        if divisor * held > 1:
            total = divide(total, fill(means, np.float32(divisor * held)))
        store(means, (row * states + k) * LANES, total)


@compiled
def write_back(panel: Any, n: int, row: int, pitch: int, width: int, gradient: Any) -> None:
    """A group's gradients by channel, back into output order."""
    step, whole = n + LANES, n // LANES * LANES
    for first in range(0, width, _STRIP):
        last = min(first + _STRIP, width)
        full = first + (last - first) // LANES * LANES
        for i in range(0, whole, LANES):
            for channel in range(first, full, LANES):
                encode_tile(panel, channel * step + i, step, gradient, (row + i) * pitch + channel, pitch)
        for channel in range(first, last):
            for i in range(whole if channel < full else 0, n):
                gradient[(row + i) * pitch + channel] = panel[channel, i]
