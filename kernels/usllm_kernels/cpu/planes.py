"""Compiled loops that make codes in output order, and multiply them with a few tokens by sums of table entries."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.lanes import LANES, load
from usllm_kernels.cpu.lookup import TABLE, TABLES, machine_instructions, table_sums
from usllm_kernels.cpu.team import BEFORE, floats, halves, my_share, part_of_a_job, whole_numbers
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
        read_row(x, token, row)
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
    given = carray(job, (BEFORE + 14,))
    tokens, inputs, outputs, columns, blocks, groups, size = given[BEFORE : BEFORE + 7]
    x, found, channels, scales, offsets, words, factors = given[BEFORE + 7 :]
    stored = (
        whole_numbers(channels, (columns,)),
        floats(scales, (columns,)),
        floats(offsets, (columns,)),
        whole_numbers(words, (blocks, columns // COLUMNS, OUTPUTS)),
        floats(factors, (groups, blocks * OUTPUTS)),
    )
    first, last = my_share(given, blocks)
    if size == 2:
        look_up(halves(x, (tokens, inputs)), *stored, halves(found, (tokens, outputs)), first, last)
    else:
        look_up(floats(x, (tokens, inputs)), *stored, floats(found, (tokens, outputs)), first, last)


@compiled
def read_row(x: Any, token: int, row: Any) -> None:
    """One row in float32."""
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
            if offsets[i] != 0:  # an infinite input would leave no number, even where nothing is added
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
