"""Compiled loops of products: weights are decoded in the first-level cache, eight channels at a time.

For a few tokens they are multiplied there and never leave it. Weights stay in hash order: each channel adds its
products to the group's sums from its own rotation on. The sums have room for two groups, and the second half is added
to the first at the end. For more tokens torch multiplies, and a group's weights are written channel by channel as they
are decoded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from usllm.sketch.scale import CHANNEL_MANTISSA, OUTPUT_MANTISSA
from usllm_kernels.compiled_operators import TOTAL
from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.lanes import LANES, add, fill, load, multiply, store
from usllm_kernels.cpu.query import combine, gather_candidates
from usllm_kernels.cpu.stream import unpack_side_by_side
from usllm_kernels.cpu.tiles import as_floats, nearest_bfloat16, store_lanes, transpose_tile


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
    rotation_step: int,  # how much further the next channel is rotated, 0 or 1
    combination: int,  # see :mod:`usllm_kernels.compiled_operators`
    first_block: int,  # of the lane blocks to multiply
    last_block: int,
    lane_channels: Any,  # int64 [lane blocks, 8]
    lane_block: Any,  # int64 [lane blocks, 7] (:mod:`usllm_kernels.cpu.layout`)
    shape: Any,  # int64 [classes, 6]: rows, depth, states, offsets in slots and buckets, first state in a channel
    buckets: Any,  # uint16: [rows, n] of every class, row r's from r * K on
    joined: Any,  # an array of the type that joined codes need, read for its type alone
) -> None:
    """What some channels add to the products with one span's weights."""
    tokens, width = x.shape
    pitch = n + LANES
    candidates, best, panel, places = _room(shape, n, joined)
    sums = np.empty((tokens, n + pitch), np.float32)
    factors = np.zeros(n + pitch if output_scales.size else 0, np.float32)
    for group in range(groups):
        first_row = start + group * n
        sums[:] = np.float32(0.0)
        _output_factors(output_scales, output_scale_base, first_row, n, factors)
        for block in range(first_block, last_block):
            rows = shape[lane_block[block, 0], 0]
            where = group, n, combination, block, lane_block, shape, buckets
            _code_panel(stream, codes, *where, places, candidates, best, panel)
            for lane in range(lane_block[block, 1]):
                channel = lane_channels[block, lane]
                place = (rotation + rotation_step * (group * width + channel)) % n
                scale = channel_scale(scales[lane_block[block, 4] + lane], scale_base[0], rows, combination)
                unit, origin, value = fill(sums, scale), lane * pitch, fill(sums, x[0, channel])
                for q in range(0, n, LANES):
                    weight = multiply(as_floats(load(panel, origin + q), sums), unit)
                    if factors.size:
                        weight = multiply(weight, load(factors, place + q))
                    if bfloat16:
                        weight = nearest_bfloat16(weight)
                    store(sums, place + q, add(load(sums, place + q), multiply(value, weight)))
                    for token in range(1, tokens):
                        at = token * (n + pitch) + place + q
                        store(sums, at, add(load(sums, at), multiply(fill(sums, x[token, channel]), weight)))
        for token in range(tokens):
            for i in range(n):
                total[token, first_row + i] += sums[token, i] + sums[token, n + i]


@compiled
def weights_by_channel(
    weights: Any,  # float32, or int16 for the bits of bfloat16, [channels with states, n], written
    stream: Any,  # from here on as for :func:`product_span`
    codes: Any,
    scales: Any,
    scale_base: Any,
    output_scales: Any,
    output_scale_base: Any,
    first_row: int,  # of the group
    n: int,
    group: int,  # within the span
    rotation: int,
    rotation_step: int,
    width: int,  # input channels
    combination: int,
    lane_channels: Any,
    lane_block: Any,
    shape: Any,
    buckets: Any,
    joined: Any,
) -> None:
    """Decoded weights of one group, channels in storage order."""
    pitch = n + LANES
    candidates, best, panel, places = _room(shape, n, joined)
    factors = np.zeros(n + pitch if output_scales.size else 0, np.float32)
    like, few = np.empty(0, np.float32), np.empty(LANES, weights.dtype)
    _output_factors(output_scales, output_scale_base, first_row, n, factors)
    for block in range(lane_block.shape[0]):
        rows = shape[lane_block[block, 0], 0]
        where = group, n, combination, block, lane_block, shape, buckets
        _code_panel(stream, codes, *where, places, candidates, best, panel)
        for lane in range(lane_block[block, 1]):
            place = (rotation + rotation_step * (group * width + lane_channels[block, lane])) % n
            row = lane_block[block, 4] + lane
            unit, origin = fill(like, channel_scale(scales[row], scale_base[0], rows, combination)), lane * pitch
            for q in range(0, n, LANES):
                weight = multiply(as_floats(load(panel, origin + q), like), unit)
                if factors.size:
                    weight = multiply(weight, load(factors, place + q))
                to = place + q - n if place + q >= n else place + q
                if max(to, q) + LANES <= n:
                    store_lanes(weights, row * n + to, weight)
                else:  # over the end of the channel, or of the group
                    store_lanes(few, 0, weight)
                    for i in range(min(LANES, n - q)):
                        weights[row, to + i - n if to + i >= n else to + i] = few[i]


@compiled
def _room(shape: Any, n: int, joined: Any) -> Any:
    """Buffers for one group: candidates, joined codes in hash order, joined codes by channel, eight offsets."""
    largest = LANES
    for class_index in range(shape.shape[0]):
        largest = max(largest, shape[class_index, 0] * shape[class_index, 2])
    return (
        np.zeros((largest + LANES, LANES), joined.dtype),
        np.empty((n + LANES, LANES), joined.dtype),
        np.empty((LANES, n + LANES), joined.dtype),
        np.empty(LANES, np.int64),
    )


@compiled
def _output_factors(output_scales: Any, base: Any, first_row: int, n: int, factors: Any) -> None:
    """Output scales of one group, written twice in a row, so that a channel reads them from its rotation on."""
    if output_scales.size:
        bits = factors.view(np.int32)
        for i in range(n):
            bits[i] = stored_scale(output_scales[first_row + i], base[0], OUTPUT_MANTISSA)
        factors[n : 2 * n] = factors[:n]


@compiled
def _code_panel(
    stream: Any,
    codes: Any,
    group: int,
    n: int,
    combination: int,
    block: int,  # of lanes
    lane_block: Any,
    shape: Any,
    buckets: Any,
    places: Any,
    candidates: Any,
    best: Any,
    panel: Any,  # [8, n + 8], written: codes of each channel in hash order, then eight zeros
) -> None:
    """Joined codes of up to eight channels in one group."""
    class_index, lanes, first, stride = (
        lane_block[block, 0],
        lane_block[block, 1],
        lane_block[block, 2],
        lane_block[block, 3],
    )
    rows, states = shape[class_index, 0], shape[class_index, 2]
    within = shape[class_index, 5] + group * rows * states
    if stream.size:
        bits = lane_block[block, 6]
        at = lane_block[block, 5] + within * bits
        unpack_side_by_side(stream, at, stride * bits, lanes, bits, rows * states, places, candidates)
    else:
        gather_candidates(codes, first + within, lanes, stride, rows * states, places, candidates)
    combine(candidates, buckets, shape[class_index, 4], rows, states, n, combination, best)
    for q in range(0, n, LANES):
        transpose_tile(best, q * LANES, panel, q, n + LANES)
    for lane in range(LANES):
        store(panel, lane * (n + LANES) + n, fill(panel, 0))


@njit(inline="always")
def stored_scale(code: Any, base: Any, mantissa: int) -> Any:
    """Bits of float32 of a stored scale (:func:`usllm.sketch.scale.decode_scale`)."""
    return (np.int32(code) + (np.int32(base) << np.int32(mantissa))) << np.int32(23 - mantissa)


@compiled
def channel_scale(code: Any, base: Any, rows: int, combination: int) -> Any:
    """What one unit of a channel's joined codes is worth, float32."""
    scale = np.empty(1, np.float32)
    scale.view(np.int32)[0] = stored_scale(code, base, CHANNEL_MANTISSA)
    return scale[0] / np.float32(rows) if combination == TOTAL else scale[0]
