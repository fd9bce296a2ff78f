"""Compiled loops of the query: codes of a span's states -> decoded weights, with the error against the latents."""

from __future__ import annotations

from typing import Any

import numpy as np

from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.lanes import LANES, add, largest_bits, load, maximum, smaller_magnitude, store
from usllm_kernels.cpu.tiles import (
    compare_tile,
    decode_codes,
    decode_tile,
    encode_codes,
    gather_tile,
    scatter_tile,
    store_element,
)

_STRIP = 256  # channels that are written together

MAGNITUDE_MAX, SIGNED_MAX, MAGNITUDE_MIN, TOTAL = 0, 1, 2, 3


@compiled
def query_span(
    codes: Any,  # int8 or int16 [states]
    scales: Any,  # float32 [in], 0 for channels without states
    factors: Any,  # float32 [out]: of the outputs
    start: int,  # output row of the first of these groups, in ``factors``, ``latent`` and ``decoded``
    n: int,
    first_group: int,  # of those to decode, within the span
    groups: int,
    rotation: int,  # of channel 0 in the span's first group
    turns: int,  # how much further the next channel is rotated, 0 or 1
    combination: int,  # one of the four above
    lane_channels: Any,  # int64 [lane blocks, 8]
    lane_block: Any,  # int64 [lane blocks, 7] (:mod:`usllm_kernels.cpu.layout`)
    shape: Any,  # int64 [classes, 6]: rows, depth, states, offsets in slots and buckets, first state in a channel
    buckets: Any,  # uint16: [rows, n] of every class, counted on from row to row
    joined: Any,  # an array of the type that joined codes need, read for its type alone
    latent: Any,  # float32 flat, to compare with, or empty
    pitch: int,  # elements from one latent row to the next
    sums: Any,  # float32 [2, in], raised by the squares of error and latent, or empty
    decoded: Any,  # float32, or int16 for the bits of bfloat16, [rows, in], written
) -> None:
    """Decoded weights of one span."""
    width = decoded.shape[1]
    panel = np.zeros((width, n + LANES), joined.dtype)
    largest = LANES
    for block in range(shape.shape[0]):
        largest = max(largest, shape[block, 0] * shape[block, 2])
    candidates = np.zeros((largest + LANES, LANES), joined.dtype)
    best = np.empty((n + LANES, LANES), joined.dtype)
    places = np.empty(LANES, np.int64)
    for group in range(first_group, first_group + groups):
        turn = rotation + turns * group * width
        for number in range(lane_block.shape[0]):
            block, lanes, first = lane_block[number, 0], lane_block[number, 1], lane_block[number, 2]
            rows, states = shape[block, 0], shape[block, 2]
            first += shape[block, 5] + group * rows * states
            gather_candidates(codes, first, lanes, lane_block[number, 3], rows * states, places, candidates)
            combine(candidates, buckets, shape[block, 4], rows, states, n, combination, best)
            straighten(best, lane_channels[number], turn, turns, n, places, panel)
        _write(panel, scales, factors, start + (group - first_group) * n, n, latent, pitch, sums, decoded)


@compiled
def gather_candidates(
    codes: Any, first: int, lanes: int, stride: int, count: int, places: Any, candidates: Any
) -> None:
    """States of eight channels side by side; lanes beyond ``lanes`` repeat the first."""
    whole = count // LANES * LANES
    for lane in range(LANES):
        places[lane] = first + (lane * stride if lane < lanes else 0)
    for k in range(0, whole, LANES):
        gather_tile(codes, places, candidates, k * LANES, LANES)
        for lane in range(LANES):
            places[lane] += LANES
    for lane in range(LANES):
        for k in range(whole, count):
            candidates[k, lane] = codes[places[lane] + k - whole]


@compiled
def combine(
    candidates: Any, buckets: Any, table: int, rows: int, states: int, n: int, combination: int, best: Any
) -> None:
    """Join the candidates of all rows at every position; the first eight positions again behind the last.

    The class's ``buckets`` begin at offset ``table``.
    """
    if rows == 1:  # one candidate is joined with nothing, whatever the way
        for q in range(n):
            store(best, q * LANES, load(candidates, np.intp(buckets[np.uint64(table + q)]) * LANES))
    elif combination == MAGNITUDE_MAX:
        for k in range(rows * states):
            encode_codes(candidates, k * LANES)
        if rows == 3:
            for q in range(n):
                found = largest_bits(
                    load(candidates, np.intp(buckets[np.uint64(table + q)]) * LANES),
                    load(candidates, np.intp(buckets[np.uint64(table + q + n)]) * LANES),
                )
                found = largest_bits(found, load(candidates, np.intp(buckets[np.uint64(table + q + 2 * n)]) * LANES))
                store(best, q * LANES, decode_codes(found))
        else:
            for q in range(n):
                found = load(candidates, np.intp(buckets[np.uint64(table + q)]) * LANES)
                for row in range(1, rows):
                    found = largest_bits(
                        found, load(candidates, np.intp(buckets[np.uint64(table + row * n + q)]) * LANES)
                    )
                store(best, q * LANES, decode_codes(found))
    else:
        for q in range(n):
            found = load(candidates, np.intp(buckets[np.uint64(table + q)]) * LANES)
            for row in range(1, rows):
                other = load(candidates, np.intp(buckets[np.uint64(table + row * n + q)]) * LANES)
                if combination == SIGNED_MAX:
                    found = maximum(found, other)
                elif combination == MAGNITUDE_MIN:
                    found = smaller_magnitude(found, other)
                else:
                    found = add(found, other)
            store(best, q * LANES, found)
    for i in range(LANES):  # a tile that reaches over the end writes what belongs at the beginning
        best[n + i] = best[i]


@compiled
def straighten(best: Any, channels: Any, turn: int, turns: int, n: int, places: Any, panel: Any) -> None:
    """Positions in hash order back into output order, channel by channel."""
    step = n + LANES
    for lane in range(LANES):
        places[lane] = (turn + turns * channels[lane]) % n
    for q in range(0, n, LANES):
        crossing = False
        for lane in range(LANES):
            crossing |= places[lane] > n - LANES
            places[lane] += channels[lane] * step
        scatter_tile(best, q * LANES, panel, places)
        for lane in range(LANES):
            places[lane] -= channels[lane] * step
        if crossing:
            for lane in range(LANES):
                column = panel[channels[lane]]
                for i in range(n, places[lane] + LANES):
                    column[i % n] = column[i]
        for lane in range(LANES):
            place = places[lane] + LANES
            places[lane] = place - n if place >= n else place


@compiled
def _write(
    panel: Any, scales: Any, factors: Any, start: int, n: int, latent: Any, pitch: int, sums: Any, decoded: Any
) -> None:
    """Scale a group's joined codes and write them by output row."""
    width, step = decoded.shape[1], n + LANES
    whole = n // LANES * LANES
    for first in range(0, width, _STRIP):
        last = min(first + _STRIP, width)
        full = first + (last - first) // LANES * LANES
        for i in range(0, whole, LANES):
            row = start + i
            if sums.size:
                for channel in range(first, full, LANES):
                    at, to = channel * step + i, row * width + channel
                    origin = row * pitch + channel
                    where = channel, factors, row, decoded, to, width
                    compare_tile(panel, at, step, scales, *where, latent, origin, pitch, sums, width)
            else:
                for channel in range(first, full, LANES):
                    at, to = channel * step + i, row * width + channel
                    decode_tile(panel, at, step, scales, channel, factors, row, decoded, to, width)
        for channel in range(first, last):
            for i in range(whole if channel < full else 0, n):
                value = np.float32(panel[channel, i]) * scales[channel] * factors[start + i]
                store_element(decoded, (start + i) * width + channel, value)
                if sums.size:
                    weight = latent[(start + i) * pitch + channel]
                    difference = value - weight
                    sums[0, channel] += difference * difference
                    sums[1, channel] += weight * weight
