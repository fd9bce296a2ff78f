"""Compiled loops over codes in output order: sums of table entries for a few tokens, matrices for many.

Must stay bit-equal to ``ops/plane_linear/reference.py`` in what is decoded: a channel's signs times scales, added up
one after another, times factor, each rounded, then bfloat16 to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.lanes import LANES, add, fill, load, multiply, shift_left, store_low, where_less
from usllm_kernels.cpu.lookup import TABLE, TABLES, machine_instructions, table_sums
from usllm_kernels.cpu.team import my_share, part_of_a_job, pointer
from usllm_kernels.cpu.tiles import store_element, store_lanes
from usllm_kernels.planes import COLUMNS, OUTPUTS

_sums = table_sums(machine_instructions())


@compiled
def look_up(
    x: Any,  # float32 [tokens, in], or int16 for the bits of bfloat16
    channels: Any,  # int32 [columns]
    scales: Any,  # float32 [columns]
    offsets: Any,  # float32 [columns]
    words: Any,  # int32 [blocks, columns / 32, 64]
    factors: Any,  # float32 [groups, blocks * 64]
    found: Any,  # of the type of x, [tokens, out], written
    first_block: int,
    last_block: int,
) -> None:
    """Products of some blocks of outputs, added up in float32; each in one order, whoever does it."""
    columns, groups, outputs = words.shape[1], factors.shape[0], found.shape[1]
    each = columns // groups
    tables, totals = np.empty(columns * TABLES * TABLE, np.float32), np.empty(groups, np.float32)
    row, one, whole = np.empty(x.shape[1], np.float32), np.empty(OUTPUTS, np.float32), np.empty(OUTPUTS, np.float32)
    for token in range(x.shape[0]):
        _read_row(x, token, row)
        _fill_tables(row, channels, scales, offsets, each * COLUMNS, tables, totals)
        for block in range(first_block, last_block):
            first = block * OUTPUTS
            whole[:] = np.float32(0.0)
            for group in range(groups):
                at_word = (block * columns + group * each) * OUTPUTS
                _sums(words, at_word, tables, group * each * TABLES * TABLE, each, one, 0)
                for i in range(OUTPUTS):
                    whole[i] += (one[i] + totals[group]) * factors[group, first + i]
            to, count = token * outputs + first, min(OUTPUTS, outputs - first)
            for i in range(0, count // LANES * LANES, LANES):
                store_lanes(found, to + i, load(whole, i))
            for i in range(count // LANES * LANES, count):
                store_element(found, to + i, whole[i])


@part_of_a_job
def look_up_part(job: Any) -> None:
    """:func:`look_up` of this thread's share of the blocks.

    A job's numbers: tokens, inputs, outputs, columns, blocks, groups, bytes of an element of ``x``; addresses of ``x``
    and of what is written; of channels, scales, offsets, words and factors.
    """
    given = carray(job, (16,))
    tokens, inputs, outputs, columns, blocks, groups, size = given[2:9]
    channels = carray(pointer(given[11]), (columns,), np.int32)
    scales = carray(pointer(given[12]), (columns,), np.float32)
    offsets = carray(pointer(given[13]), (columns,), np.float32)
    words = carray(pointer(given[14]), (blocks, columns // COLUMNS, OUTPUTS), np.int32)
    factors = carray(pointer(given[15]), (groups, blocks * OUTPUTS), np.float32)
    first, last = my_share(given[0], given[1], blocks)
    if size == 2:
        bits = carray(pointer(given[9]), (tokens, inputs), np.int16)
        rounded = carray(pointer(given[10]), (tokens, outputs), np.int16)
        look_up(bits, channels, scales, offsets, words, factors, rounded, first, last)
    else:
        x = carray(pointer(given[9]), (tokens, inputs), np.float32)
        found = carray(pointer(given[10]), (tokens, outputs), np.float32)
        look_up(x, channels, scales, offsets, words, factors, found, first, last)


@compiled
def _read_row(x: Any, token: int, row: Any) -> None:
    """One token's inputs in float32."""
    if x.itemsize == 2:
        bits = row.view(np.int32)
        for i in range(row.size):
            bits[i] = np.int32(x[token, i]) << 16
    else:
        for i in range(row.size):
            row[i] = x[token, i]


@compiled
def _fill_tables(
    row: Any, channels: Any, scales: Any, offsets: Any, group_columns: int, tables: Any, totals: Any
) -> None:
    """All sums of four columns at a time, and each group's sum of offsets."""
    totals[:] = np.float32(0.0)
    for first in range(0, channels.size, 4):
        for i in range(first, first + 4):
            totals[first // group_columns] += row[channels[i]] * offsets[i]
        one = row[channels[first]] * scales[first]
        two = row[channels[first + 1]] * scales[first + 1]
        three = row[channels[first + 2]] * scales[first + 2]
        four = row[channels[first + 3]] * scales[first + 3]
        at = first * (TABLE // 4)
        for number in range(TABLE):
            low = (one if number & 1 else -one) + (two if number & 2 else -two)
            tables[at + number] = low + ((three if number & 4 else -three) + (four if number & 8 else -four))


@compiled
def gather_inputs(
    x: Any,  # float32 [tokens, in], or int16 for the bits of bfloat16
    channels: Any,  # int32 [columns]
    scales: Any,  # float32 [columns]
    found: Any,  # of the type of x, [tokens, columns], written
    first: int,  # token
    last: int,
) -> None:
    """What codes are multiplied with: inputs in the order of columns, times scales."""
    row = np.empty(x.shape[1], np.float32)
    kept = np.empty(channels.size + LANES, np.float32)
    for token in range(first, last):
        _read_row(x, token, row)
        for column in range(channels.size):
            kept[column] = row[channels[column]] * scales[column]
        whole = channels.size // LANES * LANES
        for column in range(0, whole, LANES):
            store_lanes(found, token * channels.size + column, load(kept, column))


@compiled
def join_bits(
    bits: Any,  # uint8 [out, columns]
    words: Any,  # int32 [blocks, columns / 32, 64], written
    block: int,
) -> None:
    """The words of one block of outputs."""
    for i in range(OUTPUTS):
        for word in range(words.shape[1]):
            joined = np.uint32(0)
            for place in range(COLUMNS):
                bit = bits[block * OUTPUTS + i, word * COLUMNS + place]
                joined |= np.uint32(bit) << np.uint32(place)
            words[block, word, i] = np.int32(joined)


@compiled
def sign_columns(
    words: Any,  # int32 [blocks, columns / 32, 64]
    positive: int,  # bits of what a positive sign stands for
    negative: int,
    signs: Any,  # int16 or int32, [columns, outputs from first_block on], written
    first_block: int,
    block: int,
) -> None:
    """Signs of all columns and one block of outputs, as whatever number's bits they are to be."""
    columns = words.shape[1]
    nothing, plus, minus = fill(words, 0), fill(words, positive), fill(words, negative)
    for word in range(columns):
        at_word = (block * columns + word) * OUTPUTS
        for place in range(COLUMNS):
            up = COLUMNS - 1 - place
            to = (word * COLUMNS + place) * signs.shape[1] + (block - first_block) * OUTPUTS
            for i in range(0, OUTPUTS, LANES):
                bits = shift_left(load(words, at_word + i), up)  # the sign bit is the column's
                store_low(signs, to + i, where_less(bits, nothing, plus, minus))


@compiled
def decode_channels(
    words: Any,  # int32 [blocks, columns / 32, 64]
    starts: Any,  # int32 [channels + 1]
    scales: Any,  # float32 [columns]
    offsets: Any,  # float32 [columns]
    factors: Any,  # float32 [groups, blocks * 64]
    weights: Any,  # float32, or int16 for the bits of bfloat16, [channels, outputs from first_block on], written
    first_block: int,
    block: int,
) -> None:
    """Decoded weights of all channels and one block of outputs."""
    blocks, columns, _ = words.shape
    each = columns * COLUMNS // factors.shape[0]
    nothing = fill(words, 0)
    for channel in range(starts.size - 1):
        to = channel * weights.shape[1] + (block - first_block) * OUTPUTS
        at_factor = (starts[channel] // each) * blocks * OUTPUTS + block * OUTPUTS
        for i in range(0, OUTPUTS, LANES):
            total = fill(scales, np.float32(0.0))
            for column in range(starts[channel], starts[channel + 1]):
                at_word = (block * columns + column // COLUMNS) * OUTPUTS
                bits = shift_left(load(words, at_word + i), COLUMNS - 1 - column % COLUMNS)
                worth = scales[column]
                sign = where_less(bits, nothing, fill(scales, worth), fill(scales, -worth))
                total = add(total, add(sign, fill(scales, offsets[column])))
            store_lanes(weights, to + i, multiply(total, load(factors, at_factor + i)))
