"""Compiled loops before and behind torch's product of many tokens with codes in output order.

Before it inputs are gathered, and signs or decoded weights are written out; behind it offsets and outputs' factors are
applied. Whole weights are decoded here, too.

Must stay bit-equal to ``ops/plane_linear/reference.py`` in what is decoded: a channel's signs times scales, added up
one after another, times factor, each rounded, then bfloat16 to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.lanes import LANES, add, fill, load, multiply, shift_left, store, where_less
from usllm_kernels.cpu.planes import read_row
from usllm_kernels.cpu.signs import store_signs
from usllm_kernels.cpu.team import BEFORE, floats, halves, my_share, part_of_a_job, whole_numbers
from usllm_kernels.cpu.tiles import store_element, store_lanes
from usllm_kernels.planes import COLUMNS, OUTPUTS


@compiled
def gather_inputs(
    x: Any,  # float32 [tokens, in], or int16 for the bits of bfloat16
    channels: Any,  # int32 [columns]
    scales: Any,  # float32 [columns]
    offsets: Any,  # float32 [columns]
    gathered: Any,  # of the type of x, [tokens, columns], written
    added: Any,  # float32 [tokens], written
    first: int,  # token
    last: int,
) -> None:
    """What signs are multiplied with, inputs in the order of columns times scales, and what offsets add to a token."""
    columns = channels.size
    whole = columns // LANES * LANES
    row, kept, sums = np.empty(x.shape[1], np.float32), np.empty(columns, np.float32), np.empty(LANES, np.float32)
    nothing = fill(sums, np.float32(0.0))
    places = channels.view(np.uint32)  # numba looks whether a signed one is negative
    for token in range(first, last):
        read_row(x, token, row)
        for column in range(columns):
            kept[column] = row[places[column]]
        total = fill(sums, np.float32(0.0))
        for column in range(0, whole, LANES):
            values, shift = load(kept, column), load(offsets, column)
            part = multiply(values, shift)  # of an infinite input no number, even where nothing is added
            total = add(total, where_less(shift, nothing, part, where_less(nothing, shift, part, nothing)))
            store_lanes(gathered, token * columns + column, multiply(values, load(scales, column)))
        store(sums, 0, total)
        for column in range(whole, columns):
            if offsets[column] != 0:
                sums[column - whole] += kept[column] * offsets[column]
            store_element(gathered, token * columns + column, kept[column] * scales[column])
        added[token] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]))


@part_of_a_job
def gather_inputs_part(job: Any) -> None:
    """:func:`gather_inputs` of this thread's share of the tokens.

    A job's numbers: tokens, inputs, columns, bytes of an element of ``x``; addresses of ``x``, channels, scales and
    offsets, and of both that are written.
    """
    given = carray(job, (BEFORE + 10,))
    tokens, inputs, columns, size, x, channels, scales, offsets, gathered, added = given[BEFORE:]
    stored = whole_numbers(channels, (columns,)), floats(scales, (columns,)), floats(offsets, (columns,))
    first, last = my_share(given, tokens)
    sums = floats(added, (tokens,))
    if size == 2:
        gather_inputs(halves(x, (tokens, inputs)), *stored, halves(gathered, (tokens, columns)), sums, first, last)
    else:
        gather_inputs(floats(x, (tokens, inputs)), *stored, floats(gathered, (tokens, columns)), sums, first, last)


@compiled
def sign_rows(
    words: Any,  # int32 [blocks, columns / 32, 64]
    positive: int,  # bits of what a positive sign stands for
    negative: int,
    signs: Any,  # int16 or int32, [outputs from first_block on, columns], written
    first_block: int,
    block: int,
) -> None:
    """Signs of one block of outputs, as whatever number's bits they are to be."""
    columns = words.shape[1]
    for i in range(OUTPUTS):
        at, to = block * columns * OUTPUTS + i, ((block - first_block) * OUTPUTS + i) * signs.shape[1]
        for word in range(columns):
            store_signs(words, at + word * OUTPUTS, positive, negative, signs, to + word * COLUMNS)


@part_of_a_job
def sign_rows_part(job: Any) -> None:
    """:func:`sign_rows` of this thread's share of some blocks.

    A job's numbers: columns, first and number of the blocks, bytes of an element of what is written, bits of both
    signs; addresses of words and of what is written.
    """
    given = carray(job, (BEFORE + 8,))
    columns, start, blocks, size, positive, negative, words, signs = given[BEFORE:]
    held, shape = whole_numbers(words, (start + blocks, columns // COLUMNS, OUTPUTS)), (blocks * OUTPUTS, columns)
    first, last = my_share(given, blocks)
    for block in range(start + first, start + last):
        if size == 2:
            sign_rows(held, positive, negative, halves(signs, shape), start, block)
        else:
            sign_rows(held, positive, negative, whole_numbers(signs, shape), start, block)


@compiled
def finish_products(
    product: Any,  # float32, or int16 for the bits of bfloat16, [tokens, some outputs]
    added: Any,  # float32 [tokens]
    factors: Any,  # float32 [those outputs]
    found: Any,  # of the type of product, [tokens, out], written
    start: int,  # of those outputs
    first: int,  # token
    last: int,
) -> None:
    """``(product + added) * factors`` in its place among all outputs."""
    width = product.shape[1]
    whole = width // LANES * LANES
    row = np.empty(width, np.float32)
    for token in range(first, last):
        read_row(product, token, row)
        more, to = fill(row, added[token]), token * found.shape[1] + start
        for i in range(0, whole, LANES):
            store_lanes(found, to + i, multiply(add(load(row, i), more), load(factors, i)))
        for i in range(whole, width):
            store_element(found, to + i, (row[i] + added[token]) * factors[i])


@part_of_a_job
def finish_products_part(job: Any) -> None:
    """:func:`finish_products` of this thread's share of the tokens.

    A job's numbers: tokens, those outputs, all outputs, the first of those, bytes of an element of ``product``;
    addresses of ``product``, ``added``, the factors of those outputs, and ``found``.
    """
    given = carray(job, (BEFORE + 9,))
    tokens, width, outputs, start, size, product, added, factors, found = given[BEFORE:]
    first, last = my_share(given, tokens)
    ends, some, every = (floats(added, (tokens,)), floats(factors, (width,))), (tokens, width), (tokens, outputs)
    if size == 2:
        finish_products(halves(product, some), *ends, halves(found, every), start, first, last)
    else:
        finish_products(floats(product, some), *ends, floats(found, every), start, first, last)


@compiled
def decode_channels(
    words: Any,  # int32 [blocks, columns / 32, 64]
    channels: Any,  # int32 [columns]
    starts: Any,  # int32 [channels + 1]
    scales: Any,  # float32 [columns]
    offsets: Any,  # float32 [columns]
    factors: Any,  # float32 [groups, blocks * 64]
    weights: Any,  # float32, or int16 for the bits of bfloat16, [.., outputs from first_block on], written
    apart: bool,  # a channel's weights are written at its input, else one channel's behind the other's
    first_block: int,
    block: int,
) -> None:
    """Decoded weights of all channels and one block of outputs."""
    blocks, columns, _ = words.shape
    each = columns * COLUMNS // factors.shape[0]
    nothing = fill(words, 0)
    for channel in range(starts.size - 1):
        place = channels[starts[channel]] if apart else channel
        to = place * weights.shape[1] + (block - first_block) * OUTPUTS
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


@part_of_a_job
def decode_channels_part(job: Any) -> None:
    """:func:`decode_channels` of this thread's share of some blocks.

    A job's numbers: columns, channels, groups, all blocks, first and number of those, rows of what is written, bytes of
    its elements, whether channels lie apart; addresses of channels, starts, scales, offsets, words and factors, and of
    what is written.
    """
    given = carray(job, (BEFORE + 16,))
    columns, number, groups, all_blocks, start, blocks, rows, size, apart = given[BEFORE : BEFORE + 9]
    channels, starts, scales, offsets, words, factors, weights = given[BEFORE + 9 :]
    stored = (
        whole_numbers(words, (all_blocks, columns // COLUMNS, OUTPUTS)),
        whole_numbers(channels, (columns,)),
        whole_numbers(starts, (number + 1,)),
        floats(scales, (columns,)),
        floats(offsets, (columns,)),
        floats(factors, (groups, all_blocks * OUTPUTS)),
    )
    first, last = my_share(given, blocks)
    for block in range(start + first, start + last):
        if size == 2:
            decode_channels(*stored, halves(weights, (rows, blocks * OUTPUTS)), apart != 0, start, block)
        else:
            decode_channels(*stored, floats(weights, (rows, blocks * OUTPUTS)), apart != 0, start, block)
