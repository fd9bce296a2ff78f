"""Compiled loops of products for a few tokens: weights are decoded in the first-level cache and never leave it.

The sums of a group are kept in an order that is turned with each channel instead of turning the channel's weights: they
have room for two groups, and what lies in the second is added to the first at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from usllm.sketch.scale import CHANNEL_MANTISSA, OUTPUT_MANTISSA
from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.lanes import LANES, add, fill, load, multiply, store
from usllm_kernels.cpu.query import TOTAL, combine, gather_candidates
from usllm_kernels.cpu.stream import unpack_side_by_side
from usllm_kernels.cpu.tiles import as_floats, nearest_bfloat16, turn_tile


@compiled
def product_span(
    x: Any,  # float32 [tokens, in], one token at least
    total: Any,  # float32 [tokens, out], raised
    bfloat16: bool,  # whether decoded weights are rounded to bfloat16 before they are multiplied
    stream: Any,  # uint8, the packed codes, or empty
    codes: Any,  # int8 or int16 [states]; of packed codes an empty array of their unpacked type
    scales: Any,  # uint8 [channels with states]
    scale_base: Any,  # uint8 [1]
    output_scales: Any,  # uint8 [out], or empty
    output_scale_base: Any,  # uint8 [1], or empty
    start: int,  # first output row of the span
    n: int,
    groups: int,
    rotation: int,  # of channel 0 in the span's first group
    turns: int,  # how much further the next channel is rotated, 0 or 1
    combination: int,  # see :mod:`usllm_kernels.cpu.query`
    first_lane: int,  # of the blocks of lanes to multiply
    last_lane: int,
    lane_channels: Any,  # int64 [lane blocks, 8]
    lane_block: Any,  # int64 [lane blocks, 7] (:mod:`usllm_kernels.cpu.layout`)
    shape: Any,  # int64 [classes, 6]: rows, depth, states, offsets in slots and buckets, first state in a channel
    buckets: Any,  # uint16: [rows, n] of every class, counted on from row to row
    joined: Any,  # an array of the type that joined codes need, read for its type alone
) -> None:
    """What some channels add to the products with one span's weights."""
    tokens, width = x.shape
    largest = LANES
    for block in range(shape.shape[0]):
        largest = max(largest, shape[block, 0] * shape[block, 2])
    candidates = np.zeros((largest + LANES, LANES), joined.dtype)
    best = np.empty((n + LANES, LANES), joined.dtype)
    pitch = n + LANES
    panel = np.empty((LANES, pitch), joined.dtype)
    sums = np.empty((tokens, n + pitch), np.float32)
    factors = np.zeros(n + pitch if output_scales.size else 0, np.float32)
    factor_bits = factors.view(np.int32)
    places, scale = np.empty(LANES, np.int64), np.empty(1, np.float32)
    scale_bits = scale.view(np.int32)
    for group in range(groups):
        first_row = start + group * n
        sums[:] = np.float32(0.0)
        if output_scales.size:
            for i in range(n):
                factor_bits[i] = stored_scale(output_scales[first_row + i], output_scale_base[0], OUTPUT_MANTISSA)
            factors[n : 2 * n] = factors[:n]
        for number in range(first_lane, last_lane):
            block, lanes = lane_block[number, 0], lane_block[number, 1]
            first, stride = lane_block[number, 2], lane_block[number, 3]
            rows, states = shape[block, 0], shape[block, 2]
            within = shape[block, 5] + group * rows * states
            if stream.size:
                bit, bits = lane_block[number, 5], lane_block[number, 6]
                at = bit + within * bits
                unpack_side_by_side(stream, at, stride * bits, lanes, bits, rows * states, places, candidates)
            else:
                gather_candidates(codes, first + within, lanes, stride, rows * states, places, candidates)
            combine(candidates, buckets, shape[block, 4], rows, states, n, combination, best)
            for q in range(0, n, LANES):
                turn_tile(best, q * LANES, panel, q, pitch)
            for lane in range(lanes):
                store(panel, lane * pitch + n, fill(panel, 0))
                channel = lane_channels[number, lane]
                turn = (rotation + turns * (group * width + channel)) % n
                scale_bits[0] = stored_scale(scales[lane_block[number, 4] + lane], scale_base[0], CHANNEL_MANTISSA)
                unit = fill(sums, scale[0] / np.float32(rows) if combination == TOTAL else scale[0])
                origin, value = lane * pitch, fill(sums, x[0, channel])
                for q in range(0, n, LANES):
                    weight = multiply(as_floats(load(panel, origin + q), sums), unit)
                    if factors.size:
                        weight = multiply(weight, load(factors, turn + q))
                    if bfloat16:
                        weight = nearest_bfloat16(weight)
                    store(sums, turn + q, add(load(sums, turn + q), multiply(value, weight)))
                    for token in range(1, tokens):
                        at = token * (n + pitch) + turn + q
                        store(sums, at, add(load(sums, at), multiply(fill(sums, x[token, channel]), weight)))
        for token in range(tokens):
            for i in range(n):
                total[token, first_row + i] += sums[token, i] + sums[token, n + i]


@njit(inline="always")
def stored_scale(code: Any, base: Any, mantissa: int) -> Any:
    """Bits of float32 of a stored scale (:func:`usllm.sketch.scale.decode_scale`)."""
    return (np.int32(code) + (np.int32(base) << np.int32(mantissa))) << np.int32(23 - mantissa)
