"""Codes of the packed stream, unpacked eight at a time.

Must stay bit-equal to :func:`usllm_kernels.ops.query.reference.unpacked`, for every width of the format and at every
bit offset: codes are two's complement, lowest bit first; of one bit, 0 is 1 and 1 is -1. Nothing behind the stream's
last byte is read: windows of 8 bytes are taken where they fit, single bytes at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.lanes import LANES, Builder, intrinsic

_WIDE, _BYTES = ir.IntType(64), 8  # bits and bytes of a window: the codes, and up to seven bits before them
_MOST = 7  # widest code of which eight fit into a window; of codes twice as wide, four fit


def _eight(builder: Any, value: Any) -> Any:
    lanes = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(lanes, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _window(builder: Any, data: Any, bit: Any) -> Any:
    byte = builder.lshr(bit, ir.Constant(_WIDE, 3))
    window = builder.load(builder.bitcast(builder.gep(data, [byte]), _WIDE.as_pointer()))
    window.align = 1
    return builder.lshr(window, builder.and_(bit, ir.Constant(_WIDE, 7)))


class _Signed:
    """Codes from the low bits of eight integers: two's complement; of one bit, 0 is 1 and 1 is -1."""

    def __init__(self, builder: Any, width: Any, element: Any) -> None:
        one, zero, all_bits = (ir.Constant(_WIDE, number) for number in (1, 0, -1))
        doubled = builder.select(builder.icmp_signed("==", width, one), all_bits, zero)
        sign = builder.shl(one, builder.sub(width, one))
        numbers = builder.sub(builder.shl(one, width), one), sign, doubled
        self.builder = builder
        self.mask, self.sign, self.doubled = (_eight(builder, builder.trunc(number, element)) for number in numbers)

    def __call__(self, value: Any) -> Any:
        flipped = self.builder.xor(self.builder.and_(value, self.mask), self.sign)
        return self.builder.sub(self.builder.add(flipped, self.builder.and_(flipped, self.doubled)), self.sign)


@intrinsic
def unpack_eight(typing: Any, stream: Any, bit: Any, width: Any, codes: Any, to: Any) -> Any:
    """Eight successive codes of up to seven bits.

    ``stream`` is uint8 and read from ``bit`` on; ``codes``, int8 or int16, are written from ``to`` on.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stream, bit, width, codes, to = arguments
        data = context.make_array(signature.args[0])(context, builder, stream).data
        element = context.get_value_type(signature.args[3].dtype)
        shifts = builder.mul(_eight(builder, width), ir.Constant(ir.VectorType(_WIDE, LANES), list(range(LANES))))
        value = builder.lshr(_eight(builder, _window(builder, data, bit)), shifts)
        found = _Signed(builder, width, element)(builder.trunc(value, ir.VectorType(element, LANES)))
        Builder(context, builder).store(signature.args[3], codes, to, found)
        return context.get_dummy_value()

    return types.void(stream, types.int64, types.int64, codes, types.intp), emit


def _unpack_rows(count: int) -> Any:
    @intrinsic
    def operation(typing: Any, stream: Any, places: Any, ahead: Any, width: Any, candidates: Any, to: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            stream, places, ahead, width, candidates, to = arguments
            b, kind = Builder(context, builder), signature.args[4]
            data = context.make_array(signature.args[0])(context, builder, stream).data
            starts = context.make_array(signature.args[1])(context, builder, places).data
            element = context.get_value_type(kind.dtype)
            signed, windows = _Signed(builder, width, element), ir.Constant(ir.VectorType(_WIDE, LANES), ir.Undefined)
            for lane in range(LANES):
                start = builder.load(builder.gep(starts, [ir.Constant(_WIDE, lane)]))
                window = _window(builder, data, builder.add(start, ahead))
                windows = builder.insert_element(windows, window, ir.Constant(ir.IntType(32), lane))
            step = _eight(builder, width)
            for row in range(count):
                code = signed(builder.trunc(windows, ir.VectorType(element, LANES)))
                b.store(kind, candidates, b.offset(to, ir.Constant(_WIDE, LANES), row), code)
                windows = builder.lshr(windows, step)
            return context.get_dummy_value()

        index = types.int64
        return types.void(stream, places, index, index, candidates, types.intp), emit

    return operation


# Rows of eight channels. Each channel is read ``ahead`` bits after its bit offset in ``places``, int64 [8]: eight codes
# of up to seven bits, or four of up to fourteen.
unpack_eight_rows, unpack_four_rows = _unpack_rows(LANES), _unpack_rows(LANES // 2)


@njit(inline="always")
def unpack_one(stream: Any, bit: int, width: int) -> Any:
    """One code of 1 to 16 bits."""
    byte, last = bit >> 3, (bit + width - 1) >> 3
    value = np.int32(stream[byte])
    if last > byte:
        value |= np.int32(stream[byte + 1]) << np.int32(8)
    if last > byte + 1:
        value |= np.int32(stream[byte + 2]) << np.int32(16)
    value = (value >> np.int32(bit & 7)) & np.int32((1 << width) - 1)
    sign = np.int32(1 << (width - 1))
    return 1 - 2 * value if width == 1 else (value ^ sign) - sign


@compiled
def unpack_run(
    stream: Any,  # uint8
    bit: int,  # where the first code begins
    width: int,  # bits a code, 1 to 16
    count: int,
    codes: Any,  # int8 or int16, written
    to: int,  # from here on
) -> None:
    """Successive codes."""
    done = 0
    if width <= _MOST:
        while done + LANES <= count and (bit >> 3) + _BYTES <= stream.shape[0]:
            unpack_eight(stream, bit, width, codes, to + done)
            done, bit = done + LANES, bit + LANES * width
    for k in range(done, count):
        codes[to + k] = unpack_one(stream, bit, width)
        bit += width


@compiled
def unpack_side_by_side(
    stream: Any,  # uint8
    bit: int,  # where the codes of the first channel begin
    stride: int,  # bits from one channel to the next
    lanes: int,  # channels; lanes beyond them repeat the first
    width: int,  # bits a code, 1 to 16
    count: int,  # codes of each channel
    places: Any,  # int64 [8], written
    candidates: Any,  # int8 or wider [count + 8 or more, 8], written; rows from ``count`` on hold nothing of use
) -> None:
    """Codes of up to eight channels as rows of eight."""
    for lane in range(LANES):
        places[lane] = bit + (lane * stride if lane < lanes else 0)
    done, last = 0, bit + (lanes - 1) * stride
    while done < count and width <= 2 * _MOST and ((last + done * width) >> 3) + _BYTES <= stream.shape[0]:
        if width <= _MOST:
            unpack_eight_rows(stream, places, done * width, width, candidates, done * LANES)
            done += LANES
        else:
            unpack_four_rows(stream, places, done * width, width, candidates, done * LANES)
            done += LANES // 2
    for lane in range(LANES):
        for k in range(done, count):
            candidates[k, lane] = unpack_one(stream, places[lane] + k * width, width)


@compiled
def unpack_states(
    stream: Any,  # uint8
    class_sizes: Any,  # int64 [classes, 4]: channels, first state, states per channel, bits
    codes: Any,  # int8 or int16 [states], written
) -> None:
    """All codes of a layer."""
    bit = 0
    for class_index in range(class_sizes.shape[0]):
        first, width = class_sizes[class_index, 1], class_sizes[class_index, 3]
        count = class_sizes[class_index, 0] * class_sizes[class_index, 2]
        unpack_run(stream, bit, width, count, codes, first)
        bit += count * width
