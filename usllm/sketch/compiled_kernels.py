"""The compiled loops of :mod:`usllm.sketch.compiled`. Importing this module needs numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_LANES = 16  # channels written together: 16 float32 fill a cache line
_MAGNITUDE = np.int32(0x7FFFFFFE)
_LARGEST = np.int32(0x7FFFFFFF)


@njit(nogil=True, cache=True)
def project_group(
    columns: Any,  # int32 [in, n], the bit patterns of a group's weights, channel by channel
    group: int,  # number of the group within its span
    rotation: int,  # of channel 0 in this group
    channel_class: Any,  # int16 [in]
    channel_first: Any,  # int64 [in]
    shape: Any,  # int64 [blocks, 5]: rows, slots, states, offset in slots, offset in buckets
    slots: Any,  # uint16
    keys: Any,  # int32 [states], written
    winners: Any,  # int16 [states], written
) -> None:
    """Smallest key of every bucket in one group, and the position that has it."""
    channels, n = columns.shape
    twice = np.empty(2 * n, np.int32)
    smallest = np.empty(n, np.int32)
    winner = np.empty(n, np.int16)
    for channel in range(channels):
        block = channel_class[channel]
        if block < 0:
            continue
        column = columns[channel]
        for i in range(n):
            twice[i] = (column[i] & _MAGNITUDE) - (column[i] >> np.int32(31))
        twice[n:] = twice[:n]
        turn = (rotation + channel) % n
        values = twice[turn : turn + n]
        rows, depth, states = shape[block, 0], shape[block, 1], shape[block, 2]
        place = channel_first[channel] + group * rows * states
        offset = shape[block, 3]
        for _ in range(rows):
            members = slots[offset : offset + depth * states]
            if depth > states:  # few wide buckets: one after another
                for k in range(states):
                    least, at = _LARGEST, np.int16(0)
                    for slot in range(depth):
                        position = members[slot * states + k]
                        if position < n:
                            value = values[position]
                            at = np.int16(position) if value < least else at
                            least = min(value, least)  # no branch: which is smaller cannot be predicted
                    smallest[k] = least
                    winner[k] = at
            else:  # many narrow ones: slot by slot
                for k in range(states):
                    held = members[k] < n
                    smallest[k] = values[members[k]] if held else _LARGEST
                    winner[k] = np.int16(members[k]) if held else np.int16(0)
                for slot in range(1, depth):
                    for k in range(states):
                        position = members[slot * states + k]
                        if position < n:
                            value, before = values[position], smallest[k]
                            smallest[k] = min(value, before)
                            winner[k] = np.int16(position) if value < before else winner[k]
            keys[place : place + states] = smallest[:states]
            winners[place : place + states] = winner[:states]
            place += states
            offset += depth * states


@njit(nogil=True, cache=True)
def query_span(
    codes: Any,  # int8 or int16 [states]
    scales: Any,  # float32 [in]
    start: int,
    n: int,
    groups: int,
    rotation: int,
    channel_class: Any,
    channel_first: Any,
    shape: Any,
    buckets: Any,  # int16
    decoded: Any,  # float32 [out, in], written
) -> None:
    """Largest candidate of every weight in one span; of two equal magnitudes the negative one."""
    channels = decoded.shape[1]
    block_values = np.zeros((n, _LANES), np.float32)
    best = np.empty(n, np.int32)
    encoded = np.empty(n, np.int32)
    for group in range(groups):
        row = start + group * n
        for first in range(0, channels, _LANES):
            lanes = min(_LANES, channels - first)
            for lane in range(lanes):
                channel = first + lane
                block = channel_class[channel]
                if block < 0:
                    for i in range(n):
                        block_values[i, lane] = np.float32(0.0)
                    continue
                rows, states = shape[block, 0], shape[block, 2]
                place = channel_first[channel] + group * rows * states
                offset = shape[block, 4]
                for number in range(rows):
                    table = buckets[offset : offset + n]
                    for k in range(states):
                        code = np.int32(codes[place + k])
                        encoded[k] = (abs(code) << np.int32(1)) | np.int32(code < 0)
                    if number == 0:
                        for q in range(n):
                            best[q] = encoded[table[q]]
                    else:
                        for q in range(n):
                            best[q] = max(best[q], encoded[table[q]])
                    place += states
                    offset += n
                scale = scales[channel]
                turn = (rotation + group * channels + channel) % n
                for i in range(n):
                    key = best[i - turn]  # below zero counts from the end: the rotation wraps
                    magnitude = np.float32(key >> np.int32(1)) * scale
                    block_values[i, lane] = -magnitude if key & np.int32(1) else magnitude
            for i in range(n):
                for lane in range(lanes):
                    decoded[row + i, first + lane] = block_values[i, lane]
