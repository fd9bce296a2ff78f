"""Compiled loops over codes in output order: sums of table entries for a few tokens, decoded columns for many.

Must stay bit-equal to ``ops/plane_linear/reference.py`` in what is decoded: code times scale, rounded, times factor,
rounded, then bfloat16 to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.lanes import LANES, add, fill, load, multiply, shift_left, store_low, where_less
from usllm_kernels.cpu.lookup import TABLE, TABLES, machine_instructions, table_sums
from usllm_kernels.cpu.tiles import as_floats, store_lanes
from usllm_kernels.planes import COLUMNS, OUTPUTS

_sums = table_sums(machine_instructions())


@compiled
def look_up(
    x: Any,  # float32 [tokens, in]
    channels: Any,  # int32 [columns]
    scales: Any,  # float32 [columns]
    words: Any,  # int32 [planes, blocks, columns / 32, 64]
    factors: Any,  # float32 [groups, blocks * 64]
    step: float,
    shift: float,
    found: Any,  # float32 [tokens, blocks * 64], written
    first_block: int,
    last_block: int,
) -> None:
    """Products of some blocks of outputs; each is added up in one order, whoever does it."""
    planes, blocks, columns, _ = words.shape
    groups = factors.shape[0]
    each = columns // groups
    tables, totals = np.empty(columns * TABLES * TABLE, np.float32), np.empty(groups, np.float32)
    one, together = np.empty(OUTPUTS, np.float32), np.empty(OUTPUTS, np.float32)
    for token in range(x.shape[0]):
        _fill_tables(x, token, channels, scales, each * COLUMNS, tables, totals)
        for block in range(first_block, last_block):
            first = block * OUTPUTS
            found[token, first : first + OUTPUTS] = np.float32(0.0)
            for group in range(groups):
                together[:] = np.float32(shift) * totals[group]
                for plane in range(planes):
                    at_word = ((plane * blocks + block) * columns + group * each) * OUTPUTS
                    _sums(words, at_word, tables, group * each * TABLES * TABLE, each, one, 0)
                    worth = np.float32(step * (1 << plane))
                    for i in range(OUTPUTS):
                        together[i] += worth * one[i]
                for i in range(OUTPUTS):
                    found[token, first + i] += together[i] * factors[group, first + i]


@compiled
def _fill_tables(x: Any, token: int, channels: Any, scales: Any, group_columns: int, tables: Any, totals: Any) -> None:
    """All sums of four columns at a time, and the sums of each group."""
    totals[:] = np.float32(0.0)
    for first in range(0, channels.size, 4):
        one = x[token, channels[first]] * scales[first]
        two = x[token, channels[first + 1]] * scales[first + 1]
        three = x[token, channels[first + 2]] * scales[first + 2]
        four = x[token, channels[first + 3]] * scales[first + 3]
        totals[first // group_columns] += (one + two) + (three + four)
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
    bits = row.view(np.int32)
    for token in range(first, last):
        if found.itemsize == 2:
            for i in range(row.size):
                bits[i] = np.int32(x[token, i]) << 16
        else:
            for i in range(row.size):
                row[i] = x[token, i]
        for column in range(channels.size):
            kept[column] = row[channels[column]] * scales[column]
        for column in range(0, channels.size, LANES):  # a multiple of 32
            store_lanes(found, token * channels.size + column, load(kept, column))


@compiled
def join_bits(
    numbers: Any,  # uint8 [out, columns]
    words: Any,  # int32 [planes, blocks, columns / 32, 64], written
    block: int,
) -> None:
    """The words of one block of outputs."""
    planes, _, columns, _ = words.shape
    for i in range(OUTPUTS):
        for word in range(columns):
            for plane in range(planes):
                joined = np.uint32(0)
                for place in range(COLUMNS):
                    bit = (numbers[block * OUTPUTS + i, word * COLUMNS + place] >> plane) & 1
                    joined |= np.uint32(bit) << np.uint32(place)
                words[plane, block, word, i] = np.int32(joined)


@compiled
def sign_columns(
    words: Any,  # int32 [1, blocks, columns / 32, 64]
    positive: int,  # bits of what a positive sign stands for
    negative: int,
    signs: Any,  # int16 or int32, [columns, outputs from first_block on], written
    first_block: int,
    block: int,
) -> None:
    """Signs of all columns and one block of outputs, as whatever number's bits they are to be."""
    columns = words.shape[2]
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
def decode_columns(
    words: Any,  # int32 [planes, blocks, columns / 32, 64]
    scales: Any,  # float32 [columns]
    factors: Any,  # float32 [groups, blocks * 64]
    step: float,
    shift: float,
    weights: Any,  # float32, or int16 for the bits of bfloat16, [columns, outputs from first_block on], written
    first_block: int,
    block: int,
) -> None:
    """Decoded weights of all columns and one block of outputs."""
    planes, blocks, columns, _ = words.shape
    each = columns // factors.shape[0]
    nothing, plus, minus = fill(words, 0), fill(words, 1), fill(words, -1)
    steps, shifts = fill(scales, step), fill(scales, shift)
    for word in range(columns):
        at_word = (block * columns + word) * OUTPUTS
        at_factor = (word // each) * blocks * OUTPUTS + block * OUTPUTS
        for place in range(COLUMNS):
            column, up = word * COLUMNS + place, COLUMNS - 1 - place
            to = column * weights.shape[1] + (block - first_block) * OUTPUTS
            unit = fill(scales, scales[column])
            for i in range(0, OUTPUTS, LANES):
                bits = shift_left(load(words, at_word + i), up)  # the sign bit is the column's
                whole = where_less(bits, nothing, plus, minus)
                for plane in range(1, planes):
                    bits = shift_left(load(words, at_word + plane * blocks * columns * OUTPUTS + i), up)
                    whole = add(whole, shift_left(where_less(bits, nothing, plus, minus), plane))
                code = add(multiply(as_floats(whole, scales), steps), shifts)
                store_lanes(weights, to + i, multiply(multiply(code, unit), load(factors, at_factor + i)))
