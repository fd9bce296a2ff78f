"""Compiled loops over the blocks of GGUF: a few tokens are multiplied with codes as they lie.

A sum over a block's codes is multiplied by its scale once. Codes of four bits are stored plus eight, which is taken off
the sum: eight times that of the inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from usllm_kernels.blocks import BLOCK, BLOCK_BYTES, SCALE_BYTES
from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.lanes import LANES, add, fill, high_half, load, low_half, multiply, store, subtract
from usllm_kernels.cpu.team import BEFORE, codes_of_bytes, floats, halves, my_share, part_of_a_job
from usllm_kernels.cpu.tiles import as_floats, store_lanes

_WIDE, _NARROW = BLOCK_BYTES[8], BLOCK_BYTES[4]
_HALF = BLOCK // 2
_FP16_BIAS = 2.0**112  # between the exponents of fp16 and of fp32, once its bits stand in the place of fp32's


@compiled
def multiply_blocks(
    x: Any,  # float32 [tokens, in]
    packed: Any,  # uint8 [out, bytes of a row]
    bits: int,  # 8 or 4
    found: Any,  # float32 [tokens, out], written
    first: int,  # row
    last: int,
) -> None:
    """Products of some rows; each is added up in one order."""
    tokens, columns = x.shape
    blocks = columns // BLOCK
    size = _WIDE if bits == 8 else _NARROW
    codes, signed, row_bytes = packed.reshape(-1), packed.reshape(-1).view(np.int8), packed.shape[1]
    scale_bits = np.empty(blocks, np.int32)
    scales, sums, inputs = scale_bits.view(np.float32), np.empty(LANES, np.float32), x.reshape(-1)
    eights = np.zeros((tokens, blocks), np.float32)
    if bits == 4:
        for token in range(tokens):
            for block in range(blocks):
                for i in range(BLOCK):
                    eights[token, block] += np.float32(8.0) * x[token, block * BLOCK + i]
    for row in range(first, last):
        start = row * row_bytes
        for block in range(blocks):
            scale_bits[block] = _scale_bits(codes, start + block * size)
        for block in range(blocks):
            scales[block] *= np.float32(_FP16_BIAS)
        for token in range(tokens):
            total, taken = fill(sums, np.float32(0.0)), np.float32(0.0)
            for block in range(blocks):
                at, of = start + block * size + SCALE_BYTES, token * columns + block * BLOCK
                part = fill(sums, np.float32(0.0))
                if bits == 8:
                    for i in range(0, BLOCK, LANES):
                        code = as_floats(load(signed, at + i), sums)
                        part = add(part, multiply(code, load(inputs, of + i)))
                else:
                    for i in range(0, _HALF, LANES):
                        both = load(codes, at + i)
                        low, high = as_floats(low_half(both), sums), as_floats(high_half(both), sums)
                        part = add(part, multiply(low, load(inputs, of + i)))
                        part = add(part, multiply(high, load(inputs, of + _HALF + i)))
                    taken += scales[block] * eights[token, block]
                total = add(total, multiply(part, fill(sums, scales[block])))
            store(sums, 0, total)
            whole = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]))
            found[token, row] = whole - taken


@compiled
def _scale_bits(codes: Any, at: int) -> Any:
    """Bits of float32 of a scale in fp16 over :data:`_FP16_BIAS`; of one that is infinite or no number, itself."""
    half = np.int32(codes[at]) | (np.int32(codes[at + 1]) << 8)
    bits = ((half & 0x7FFF) << 13) | ((half & 0x8000) << 16)
    return bits | 0x7F800000 if half & 0x7C00 == 0x7C00 else bits


@part_of_a_job
def multiply_blocks_part(job: Any) -> None:
    """:func:`multiply_blocks` of this thread's share of the rows.

    A job's numbers: tokens, inputs, rows, bytes of a row, bits; addresses of ``x``, ``packed`` and ``found``.
    """
    given = carray(job, (BEFORE + 8,))
    tokens, inputs, rows, row_bytes, bits, x, packed, found = given[BEFORE:]
    first, last = my_share(given, rows)
    values, into = floats(x, (tokens, inputs)), floats(found, (tokens, rows))
    multiply_blocks(values, codes_of_bytes(packed, (rows, row_bytes)), bits, into, first, last)


@compiled
def decode_blocks(
    packed: Any,  # uint8 [out, bytes of a row]
    bits: int,  # 8 or 4
    weight: Any,  # int16 for the bits of bfloat16, [out, in], written
    first: int,  # row
    last: int,
) -> None:
    """Weights of some rows: ``d * q``, which float32 holds, rounded."""
    size = _WIDE if bits == 8 else _NARROW
    blocks, columns, row_bytes = packed.shape[1] // size, weight.shape[1], packed.shape[1]
    codes, signed = packed.reshape(-1), packed.reshape(-1).view(np.int8)
    scale_bits, eights = np.empty(1, np.int32), np.full(LANES, 8.0, np.float32)
    scale, eight = scale_bits.view(np.float32), load(eights, 0)
    for row in range(first, last):
        for block in range(blocks):
            at, to = row * row_bytes + block * size, row * columns + block * BLOCK
            scale_bits[0] = _scale_bits(codes, at)
            worth = fill(eights, scale[0] * np.float32(_FP16_BIAS))
            at += SCALE_BYTES
            if bits == 8:
                for i in range(0, BLOCK, LANES):
                    store_lanes(weight, to + i, multiply(as_floats(load(signed, at + i), eights), worth))
            else:
                for i in range(0, _HALF, LANES):
                    both = load(codes, at + i)
                    low, high = as_floats(low_half(both), eights), as_floats(high_half(both), eights)
                    store_lanes(weight, to + i, multiply(subtract(low, eight), worth))
                    store_lanes(weight, to + _HALF + i, multiply(subtract(high, eight), worth))


@part_of_a_job
def decode_blocks_part(job: Any) -> None:
    """:func:`decode_blocks` of this thread's share of the rows.

    A job's numbers: inputs, rows, bytes of a row, bits; addresses of ``packed`` and of what is written.
    """
    given = carray(job, (BEFORE + 6,))
    inputs, rows, row_bytes, bits, packed, weight = given[BEFORE:]
    first, last = my_share(given, rows)
    decode_blocks(codes_of_bytes(packed, (rows, row_bytes)), bits, halves(weight, (rows, inputs)), first, last)
