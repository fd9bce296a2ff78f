"""The compiled loops of :mod:`usllm.sketch.compiled`. Importing this module needs numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_LANES = 16  # channels read together: 16 float32 fill a cache line
_MAGNITUDE = np.int32(0x7FFFFFFE)
_LARGEST = np.int32(0x7FFFFFFF)


@njit(nogil=True, cache=True)
def project_span(
    bits: Any,  # int32 [out, in], the weights' bit patterns
    start: int,
    n: int,
    groups: int,
    rotation: int,
    channel_class: Any,  # int16 [in]
    channel_first: Any,  # int64 [in]
    shape: Any,  # int64 [blocks, 5]: rows, slots, states, offset in slots, offset in buckets
    slots: Any,  # int16
    keys: Any,  # int32 [states], written
    winners: Any,  # int16 [states], written
) -> None:
    """Smallest key of every bucket in one span, and the position that has it."""
    channels = bits.shape[1]
    twice = np.empty((_LANES, 2 * n + 16), np.int32)  # padded: lanes a power of two apart would share cache sets
    smallest = np.empty(n, np.int32)
    winner = np.empty(n, np.int16)
    for group in range(groups):
        row = start + group * n
        for first in range(0, channels, _LANES):
            lanes = min(_LANES, channels - first)
            for i in range(n):
                for lane in range(lanes):
                    value = bits[row + i, first + lane]
                    key = (value & _MAGNITUDE) - (value >> np.int32(31))
                    twice[lane, i] = key
                    twice[lane, i + n] = key
            for lane in range(lanes):
                channel = first + lane
                block = channel_class[channel]
                if block < 0:
                    continue
                turn = (rotation + group * channels + channel) % n
                values = twice[lane, turn : turn + n]
                rows, depth, states = shape[block, 0], shape[block, 1], shape[block, 2]
                place = channel_first[channel] + group * rows * states
                offset = shape[block, 3]
                for _ in range(rows):
                    members = slots[offset : offset + depth * states]
                    for k in range(states):  # the first slot of a bucket may be its only one, or none
                        held = members[k] < n
                        smallest[k] = values[members[k]] if held else _LARGEST
                        winner[k] = members[k] if held else np.int16(0)
                    for slot in range(1, depth):
                        base = slot * states
                        for k in range(states):
                            position = members[base + k]
                            if position < n:
                                value, before = values[position], smallest[k]
                                smallest[k] = min(value, before)  # no branch: which is smaller cannot be predicted
                                winner[k] = position if value < before else winner[k]
                    for k in range(states):
                        keys[place + k] = smallest[k]
                        winners[place + k] = winner[k]
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
