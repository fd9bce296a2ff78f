"""Tiles of decoded weights, made straight from the states: the part that all Triton kernels share.

A tile is [channels, outputs of one group]. The outputs of one channel read one row of a table (contiguous, but for one
wrap) and states within a few dozen bytes. Outputs lie along the lanes of a warp, so that a warp reads in one place.
Channels are addressed by their active index, which counts those that hold states in storage order; the others
are never looked at. The integers are those of :mod:`usllm.sketch.codec`; offsets that may pass 2^31 are 64 bits wide.
Nothing is computed in bfloat16: the interpreter would do so wrongly, and silently.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Annotations mean something else to Triton.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from usllm_kernels import compiled_operators, tables

MAGNITUDE_MAX = tl.constexpr(compiled_operators.MAGNITUDE_MAX)
SIGNED_MAX = tl.constexpr(compiled_operators.SIGNED_MAX)
MAGNITUDE_MIN = tl.constexpr(compiled_operators.MAGNITUDE_MIN)
TOTAL = tl.constexpr(compiled_operators.TOTAL)

CLASS_COLUMNS = tl.constexpr(tables.CLASS_COLUMNS)


class Sketch(NamedTuple):
    """States and the tables of their plan, as a kernel's argument (:func:`usllm_kernels.launch.sketch_argument`).

    Attributes:
        codes: int8 or int16 [states], or uint8, the packed stream.
        scales: uint8 [channels with states].
        scale_base: uint8 [1].
        output_scales: uint8 [out].
        output_scale_base: uint8 [1].
        channel, class_index, first_state, first_bit, bits: see :class:`usllm_kernels.tables.Tables`.
        num_active: channels that hold states.
        width: input channels.
        ROTATION_STEP: how much further the next channel is rotated, 0 or 1.
        ROWS: the most rows of a class.
        COMBINATION: how the candidates of several rows are joined (:mod:`usllm_kernels.compiled_operators`).
        PACKED: whether the codes are the packed stream.
        OUTPUT_SCALE: whether output scales are applied.
    """

    codes: Any
    scales: Any
    scale_base: Any
    output_scales: Any
    output_scale_base: Any
    channel: Any
    class_index: Any
    first_state: Any
    first_bit: Any
    bits: Any
    num_active: Any
    width: Any
    ROTATION_STEP: tl.constexpr
    ROWS: tl.constexpr
    COMBINATION: tl.constexpr
    PACKED: tl.constexpr
    OUTPUT_SCALE: tl.constexpr


class Groups(NamedTuple):
    """A run of equal groups, as a kernel's argument; see :class:`usllm_kernels.tables.SpanTables`."""

    shape: Any
    buckets: Any
    start: Any
    n: Any
    rotation: Any


@triton.jit
def load_codes(codes, first, bucket, skip, bits, mask, PACKED: tl.constexpr):
    """State codes as int32 [channels, outputs].

    ``first`` [channels, 1] is a channel's first state in this group. Of the packed stream it is the byte in which that
    state begins, after ``skip`` bits of others: offsets from there fit into 32 bits.
    """
    if PACKED:
        bit = skip + bucket * bits
        place = codes + first + (bit >> 3)
        end = (bit & 7) + bits
        value = tl.load(place, mask=mask, other=0).to(tl.int32)
        value |= tl.load(place + 1, mask=mask & (end > 8), other=0).to(tl.int32) << 8
        value |= tl.load(place + 2, mask=mask & (end > 16), other=0).to(tl.int32) << 16
        value = (value >> (bit & 7)) & ((1 << bits) - 1)
        signed = value - ((value >> (bits - 1)) << bits)
        return tl.where(bits == 1, 1 - 2 * value, signed)
    return tl.load(codes + first + bucket, mask=mask, other=0).to(tl.int32)


@triton.jit
def stored_scale(code, base, MANTISSA: tl.constexpr):
    """usllm.sketch.scale.decode_scale."""
    top = code.to(tl.int32) + (base.to(tl.int32) << MANTISSA)
    return (top << (23 - MANTISSA)).to(tl.float32, bitcast=True)


@triton.jit
def bfloat16_bits(value):
    """Upper half of float32 rounded to nearest even, in the low bits of int32; by hand: the interpreter truncates."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return tl.where(value == value, rounded, 0x7FC0)  # a NaN may have its only bits in the lower half, or overflow


@triton.jit
def as_stored(value, BFLOAT16: tl.constexpr, dtype: tl.constexpr):
    """float32 in the type of the target; the bits of bfloat16 where that is the target's."""
    if BFLOAT16:
        return bfloat16_bits(value).to(tl.int16)
    return value.to(dtype)


@triton.jit
def as_multiplied(weight, dtype: tl.constexpr):
    """A decoded weight as products of ``dtype`` take it: rounded to that type, in float32."""
    if dtype == tl.bfloat16:
        return (bfloat16_bits(weight) << 16).to(tl.float32, bitcast=True)
    return weight.to(dtype).to(tl.float32)


@triton.jit
def rotated(i, channel, group, n, rotation, width, ROTATION_STEP: tl.constexpr):
    """Position in hash order of output ``i`` of a group, [channels, outputs]."""
    of_channel = (rotation + ROTATION_STEP * (group * width + channel)) % n
    q = i[None, :] - of_channel[:, None]
    return tl.where(q < 0, q + n, q)


@triton.jit
def decoded_tile(
    sketch,  # Sketch
    span,  # Groups
    active_index,  # [channels], which of the channels that hold states
    i,  # [outputs], which of the group
    group,
):
    """Decoded weights, float32 [channels, outputs]; 0 outside of the group and where no channel has such an index."""
    held = (active_index >= 0) & (active_index < sketch.num_active)
    channel = tl.load(sketch.channel + active_index, mask=held, other=0)
    row_of = tl.load(sketch.class_index + active_index, mask=held, other=0) * CLASS_COLUMNS
    rows = tl.load(span.shape + row_of, mask=held, other=0)
    states = tl.load(span.shape + row_of + 2, mask=held, other=0)
    table = tl.load(span.shape + row_of + 4, mask=held, other=0)
    place = tl.load(span.shape + row_of + 5, mask=held, other=0) + group * rows * states
    width_in_bits = tl.load(sketch.bits + active_index, mask=held, other=1)
    if sketch.PACKED:
        bit = tl.load(sketch.first_bit + active_index, mask=held, other=0) + place.to(tl.int64) * width_in_bits
        first, skip = bit >> 3, (bit & 7).to(tl.int32)
    else:
        first = tl.load(sketch.first_state + active_index, mask=held, other=0) + place
        skip = tl.zeros(place.shape, tl.int32)
    q = rotated(i, channel, group, span.n, span.rotation, sketch.width, sketch.ROTATION_STEP)
    mask = held[:, None] & (i < span.n)[None, :]
    joined = tl.zeros(q.shape, tl.int32)
    for row in range(sketch.ROWS):
        live = mask & (row < rows)[:, None]
        bucket = tl.load(span.buckets + table[:, None] + row * span.n + q, mask=live, other=0).to(tl.int32) & 0xFFFF
        code = load_codes(
            sketch.codes,
            first[:, None],
            bucket,
            skip[:, None],
            width_in_bits[:, None],
            live,
            sketch.PACKED,
        )
        if sketch.COMBINATION == MAGNITUDE_MAX:  # keys order by magnitude, then sign
            joined = tl.where(live, tl.maximum(joined, 2 * tl.abs(code) + (code < 0).to(tl.int32)), joined)
        elif sketch.COMBINATION == SIGNED_MAX:
            joined = tl.where(live & ((code > joined) | (row == 0)), code, joined)
        elif sketch.COMBINATION == MAGNITUDE_MIN:
            joined = tl.where(live & ((tl.abs(code) < tl.abs(joined)) | (row == 0)), code, joined)
        else:
            joined += tl.where(live, code, 0)
    if sketch.COMBINATION == MAGNITUDE_MAX:
        joined = tl.where((joined & 1) == 1, -(joined >> 1), joined >> 1)
    scale = stored_scale(tl.load(sketch.scales + active_index, mask=held, other=0), tl.load(sketch.scale_base), 3)
    if sketch.COMBINATION == TOTAL:
        scale = tl.div_rn(scale, tl.maximum(rows, 1).to(tl.float32))
    weight = joined.to(tl.float32) * scale[:, None]
    if sketch.OUTPUT_SCALE:
        code = tl.load(sketch.output_scales + span.start + group * span.n + i, mask=i < span.n, other=0)
        weight *= stored_scale(code, tl.load(sketch.output_scale_base), 5)[None, :]
    return weight
