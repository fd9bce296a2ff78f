"""Compiled loops of the query: codes of a span's states -> decoded weights, with the error against the latents."""

from __future__ import annotations

from typing import Any

import numpy as np

from usllm_kernels.compiled_operators import MAGNITUDE_MAX, MAGNITUDE_MIN, SIGNED_MAX
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
    rotation_step: int,  # how much further the next channel is rotated, 0 or 1
    combination: int,  # see :mod:`usllm_kernels.compiled_operators`
    lane_channels: Any,  # int64 [lane blocks, 8]
    lane_block: Any,  # int64 [lane blocks, 7] (:mod:`usllm_kernels.cpu.layout`)
    shape: Any,  # int64 [classes, 6]: rows, depth, states, offsets in slots and buckets, first state in a channel
    buckets: Any,  # uint16: [rows, n] of every class, row r's from r * K on
    joined: Any,  # an array of the type that joined codes need, read for its type alone
    latent: Any,  # float32 flat, to compare with, or empty
    pitch: int,  # elements from one latent row to the next
    sums: Any,  # float32 [2, in], squares of error and latent are added to it; or empty
    decoded: Any,  # float32, or int16 for the bits of bfloat16, [rows, in], written
) -> None:
    """Decoded weights of one span."""
    width = decoded.shape[1]
    panel = np.zeros((width, n + LANES), joined.dtype)
    largest = LANES
    for class_index in range(shape.shape[0]):
        largest = max(largest, shape[class_index, 0] * shape[class_index, 2])
    candidates = np.zeros((largest + LANES, LANES), joined.dtype)
    best = np.empty((n + LANES, LANES), joined.dtype)
    places = np.empty(LANES, np.int64)
    for group in range(first_group, first_group + groups):
        of_group = rotation + rotation_step * group * width
        for block in range(lane_block.shape[0]):
            class_index, lanes, first = lane_block[block, 0], lane_block[block, 1], lane_block[block, 2]
            rows, states = shape[class_index, 0], shape[class_index, 2]
            first += shape[class_index, 5] + group * rows * states
            gather_candidates(codes, first, lanes, lane_block[block, 3], rows * states, places, candidates)
            combine(candidates, buckets, shape[class_index, 4], rows, states, n, combination, best)
            straighten(best, lane_channels[block], of_group, rotation_step, n, places, panel)
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
    """Join the candidates of all rows at every position; the first eight positions are repeated after the last.

    The class's ``buckets`` begin at offset ``table``.
    """
    if rows == 1:  # a single candidate is the result, however candidates are joined
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
    for i in range(LANES):  # tiles that cross the end continue at the beginning
        best[n + i] = best[i]


@compiled
def straighten(best: Any, channels: Any, of_group: int, rotation_step: int, n: int, places: Any, panel: Any) -> None:
    """Positions in hash order back into output order, channel by channel; ``of_group`` is the rotation of channel 0."""
    step = n + LANES
    for lane in range(LANES):
        places[lane] = (of_group + rotation_step * channels[lane]) % n
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
