"""Tiles of 8x8 that are transposed while they are moved, and the codings that are applied on the way.

All offsets and strides count elements of contiguous arrays; strides are between rows of a tile.

Must stay bit-equal to the reference:

- keys of weights and of codes, and back: :mod:`usllm.sketch.operators.absmaxmin`, which also settles ties;
- a decoded weight is code times channel scale, rounded, times output scale, rounded, in this order
  (:func:`usllm.sketch.codec.query`);
- bfloat16 is rounded to nearest, ties to even, as torch does; decoded weights are finite, so NaN is not provided for.

Sums of squared error and weight are compared with a tolerance, and are the same for every number of threads.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from usllm_kernels.cpu.lanes import LANES, Builder, Lanes, intrinsic, is_float

_MAGNITUDE = 0x7FFFFFFE  # of a float32 without its last bit, which the sign takes (usllm.sketch.operators.absmaxmin)


@intrinsic
def encode_tile(typing: Any, source: Any, at: Any, stride: Any, target: Any, to: Any, step: Any) -> Any:
    """Transpose a tile. int32 sources are float32 bit patterns and become keys that order by magnitude, then sign."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = Builder(context, builder)
        source, at, stride, target, to, step = arguments
        rows = b.rows(signature.args[0], source, at, stride)
        if not is_float(signature.args[0]):
            rows = [
                builder.sub(builder.and_(row, b.same(_MAGNITUDE, row)), builder.ashr(row, b.same(31, row)))
                for row in rows
            ]
        for number, column in enumerate(b.transpose(rows)):
            b.store(signature.args[3], target, b.offset(to, step, number), column)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), emit


@intrinsic
def encode_element(typing: Any, source: Any, at: Any) -> Any:
    """What :func:`encode_tile` makes of one element."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        value = builder.load(builder.gep(data, [arguments[1]]))
        if is_float(signature.args[0]):
            return value
        magnitude = builder.and_(value, ir.Constant(value.type, _MAGNITUDE))
        return builder.sub(magnitude, builder.ashr(value, ir.Constant(value.type, 31)))

    return source.dtype(source, types.intp), emit


@intrinsic
def gather_tile(typing: Any, source: Any, places: Any, target: Any, to: Any, step: Any) -> Any:
    """Transpose eight rows that start at eight offsets (int64 [8]) into a tile, converted to the target's integers."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = Builder(context, builder)
        source, places, target, to, step = arguments
        starts = context.make_array(signature.args[1])(context, builder, places).data
        rows = [
            b.load(signature.args[0], source, builder.load(builder.gep(starts, [ir.Constant(ir.IntType(64), lane)])))
            for lane in range(LANES)
        ]
        for number, column in enumerate(b.transpose(rows)):
            element = context.get_value_type(signature.args[2].dtype)
            if not is_float(signature.args[2]) and column.type.element.width < element.width:
                column = builder.sext(column, ir.VectorType(element, LANES))
            b.store(signature.args[2], target, b.offset(to, step, number), column)
        return context.get_dummy_value()

    return types.void(source, places, target, types.intp, types.intp), emit


@intrinsic
def transpose_tile(typing: Any, source: Any, at: Any, target: Any, to: Any, step: Any) -> Any:
    """Transpose eight successive rows of eight into rows that lie ``step`` apart."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = Builder(context, builder)
        source, at, target, to, step = arguments
        rows = b.rows(signature.args[0], source, at, ir.Constant(ir.IntType(64), LANES))
        for number, column in enumerate(b.transpose(rows)):
            b.store(signature.args[2], target, b.offset(to, step, number), column)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp, types.intp), emit


@intrinsic
def scatter_tile(typing: Any, source: Any, at: Any, target: Any, places: Any) -> Any:
    """Transpose eight successive rows of eight into rows that start at eight offsets (int64 [8])."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = Builder(context, builder)
        source, at, target, places = arguments
        starts = context.make_array(signature.args[3])(context, builder, places).data
        rows = b.rows(signature.args[0], source, at, ir.Constant(ir.IntType(64), LANES))
        for lane, column in enumerate(b.transpose(rows)):
            place = builder.load(builder.gep(starts, [ir.Constant(ir.IntType(64), lane)]))
            b.store(signature.args[2], target, place, column)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, places), emit


@intrinsic
def encode_codes(typing: Any, array: Any, at: Any) -> Any:
    """In place, state codes -> keys that order by magnitude, then sign, read as unsigned numbers."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = Builder(context, builder)
        array, at = arguments
        code = b.load(signature.args[0], array, at)
        negative = builder.ashr(code, b.same(code.type.element.width - 1, code))  # 0 or -1
        magnitude = builder.sub(builder.xor(code, negative), negative)
        key = builder.sub(builder.shl(magnitude, b.same(1, code)), negative)
        b.store(signature.args[0], array, at, key)
        return context.get_dummy_value()

    return types.void(array, types.intp), emit


@intrinsic
def decode_codes(typing: Any, keys: Any) -> Any:
    """Inverse of :func:`encode_codes`, on lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b, (key,) = Builder(context, builder), arguments
        one = b.same(1, key)
        negative = builder.sub(ir.Constant(key.type, None), builder.and_(key, one))
        return builder.sub(builder.xor(builder.lshr(key, one), negative), negative)

    return keys(keys), emit


def _bfloat16(b: Builder, values: Any) -> Any:
    """Bits of bfloat16, rounded to nearest even, in the low half of int32 lanes."""
    bits = b.ir.bitcast(values, ir.VectorType(ir.IntType(32), LANES))
    odd = b.ir.and_(b.ir.lshr(bits, b.same(16, bits)), b.same(1, bits))
    return b.ir.lshr(b.ir.add(bits, b.ir.add(odd, b.same(0x7FFF, bits))), b.same(16, bits))


def _to_stored(b: Builder, values: Any, kind: Any) -> Any:
    """float32 lanes as the target holds them: themselves, or the bits of bfloat16."""
    return values if is_float(kind) else b.ir.trunc(_bfloat16(b, values), ir.VectorType(ir.IntType(16), LANES))


@intrinsic
def nearest_bfloat16(typing: Any, values: Any) -> Any:
    """float32 lanes rounded to what bfloat16 holds."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b, (values,) = Builder(context, builder), arguments
        bits = _bfloat16(b, values)
        return builder.bitcast(builder.shl(bits, b.same(16, bits)), values.type)

    return values(values), emit


@intrinsic
def as_floats(typing: Any, values: Any, like: Any) -> Any:
    """Lanes of whole numbers or of float32 as lanes of ``like``, an array of float32 or float64."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(context.get_value_type(signature.args[1].dtype), LANES)
        convert = builder.fpext if is_float(signature.args[0]) else builder.sitofp
        return convert(arguments[0], kind)

    return Lanes(like.dtype)(values, like), emit


@intrinsic
def store_lanes(typing: Any, target: Any, at: Any, values: Any) -> Any:
    """Store eight float32 as the target holds them: themselves, or the bits of bfloat16."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b, (target, at, values) = Builder(context, builder), arguments
        b.store(signature.args[0], target, at, _to_stored(b, values, signature.args[0]))
        return context.get_dummy_value()

    return types.void(target, types.intp, values), emit


@intrinsic
def store_element(typing: Any, target: Any, at: Any, value: Any) -> Any:
    """Store one float32 as :func:`decode_tile` stores eight."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = Builder(context, builder)
        target, at, value = arguments
        lanes = ir.Constant(ir.VectorType(ir.FloatType(), LANES), ir.Undefined)
        zero = ir.Constant(ir.IntType(32), 0)
        stored = _to_stored(b, builder.insert_element(lanes, value, zero), signature.args[0])
        data = context.make_array(signature.args[0])(context, builder, target).data
        builder.store(builder.extract_element(stored, zero), builder.gep(data, [at]))
        return context.get_dummy_value()

    return types.void(target, types.intp, types.float32), emit


def _decoded(b: Builder, signature: Any, arguments: Any) -> list[Any]:
    codes, at, stride, scales, channel, factors, first = arguments[:7]
    scale = b.load(signature.args[3], scales, channel)
    wide = ir.VectorType(ir.IntType(32), LANES)
    rows = b.transpose(b.rows(signature.args[0], codes, at, stride))
    whole = [row if row.type.element.width == 32 else b.ir.sext(row, wide) for row in rows]
    of_rows = b.load(signature.args[5], factors, first)
    index = ir.VectorType(ir.IntType(32), LANES)
    each = [b.ir.shuffle_vector(of_rows, of_rows, ir.Constant(index, [number] * LANES)) for number in range(LANES)]
    return [
        b.ir.fmul(b.ir.fmul(b.ir.sitofp(row, scale.type), scale), factor)
        for row, factor in zip(whole, each, strict=True)
    ]


@intrinsic
def decode_tile(
    typing: Any,
    codes: Any,
    at: Any,
    stride: Any,
    scales: Any,
    channel: Any,
    factors: Any,
    first: Any,
    target: Any,
    to: Any,
    step: Any,
) -> Any:
    """Transpose a tile of joined codes [8 channels, 8 outputs] and decode it: code times channel and output scale.

    ``factors`` [out], float32, hold the output's scales, the first output's at ``first``. ``target`` is float32, or
    int16 for the bits of bfloat16.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = Builder(context, builder)
        target, to, step = arguments[7:]
        for number, row in enumerate(_decoded(b, signature, arguments)):
            b.store(signature.args[7], target, b.offset(to, step, number), _to_stored(b, row, signature.args[7]))
        return context.get_dummy_value()

    index = types.intp
    return types.void(codes, index, index, scales, index, factors, index, target, index, index), emit


@intrinsic
def compare_tile(
    typing: Any,
    codes: Any,
    at: Any,
    stride: Any,
    scales: Any,
    channel: Any,
    factors: Any,
    first: Any,
    target: Any,
    to: Any,
    step: Any,
    latent: Any,
    origin: Any,
    pitch: Any,
    sums: Any,
    channels: Any,
) -> Any:
    """:func:`decode_tile`, and what the tile adds to the squares of error and of latent weight, float32 [2, in]."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        b = Builder(context, builder)
        channel = arguments[4]
        target, to, step, latent, origin, pitch, sums, channels = arguments[7:]
        kinds = signature.args
        below = builder.add(channels, channel)
        error, energy = b.load(kinds[13], sums, channel), b.load(kinds[13], sums, below)
        for number, row in enumerate(_decoded(b, signature, arguments)):
            b.store(kinds[7], target, b.offset(to, step, number), _to_stored(b, row, kinds[7]))
            weight = b.load(kinds[10], latent, b.offset(origin, pitch, number))
            difference = builder.fsub(row, weight)
            error = builder.fadd(error, builder.fmul(difference, difference))
            energy = builder.fadd(energy, builder.fmul(weight, weight))
        b.store(kinds[13], sums, channel, error)
        b.store(kinds[13], sums, below, energy)
        return context.get_dummy_value()

    index = types.intp
    places = (codes, index, index, scales, index, factors, index, target, index, index)
    return types.void(*places, latent, index, index, sums, index), emit
