"""Eight numbers side by side: a vector type for numba's compiled functions.

Numba leaves vectors to LLVM's guesses, and LLVM does not guess table lookups of whole rows nor transpositions. Here a
row of eight is a value of its own, so that a loop says what it means: ``accumulate = minimum(accumulate, load(a, i))``.
LLVM lowers eight lanes to whatever registers the machine has (AVX2, AVX-512, NEON), at run time: no compiler has to be
installed.

Must stay bit-equal to :mod:`usllm.sketch.codec`:

- every float operation is rounded on its own: no fast-math flag, no fused multiply-add;
- of equal magnitudes ``smaller_magnitude`` keeps the first, as :class:`usllm.sketch.operators.countmin.CountMin` does,
  and the condition of ``where_less`` is strict, so that the first of equal members wins;
- integers wrap as two's complement.

Nothing new is written in LLVM's instructions unless a benchmark pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core.datamodel.models import PrimitiveModel

LANES = 8

# Numba calls the decorated function with one argument more than the compiled code passes; no type says that.
intrinsic: Any = extending.intrinsic

_INDEX = ir.IntType(64)


class Lanes(types.Type):
    """Eight numbers of one array's type."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@extending.register_model(Lanes)
class LanesModel(PrimitiveModel):
    """Kept in one LLVM vector."""

    def __init__(self, manager: Any, kind: Lanes) -> None:
        element = manager.lookup(kind.dtype).get_value_type()
        super().__init__(manager, kind, ir.VectorType(element, LANES))


class Builder:
    """What the vector instructions of this package are written with: an LLVM builder that knows numba's arrays."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.ir = context, builder

    def _address(self, kind: Any, array: Any, at: Any) -> Any:
        data = self.context.make_array(kind)(self.context, self.ir, array).data
        element = self.context.get_value_type(kind.dtype)
        return self.ir.bitcast(self.ir.gep(data, [at]), ir.VectorType(element, LANES).as_pointer())

    def load(self, kind: Any, array: Any, at: Any) -> Any:
        """Eight elements from offset ``at`` of a contiguous array."""
        found = self.ir.load(self._address(kind, array, at))
        found.align = kind.dtype.bitwidth // 8
        return found

    def store(self, kind: Any, array: Any, at: Any, value: Any) -> None:
        """Inverse of :meth:`load`."""
        self.ir.store(value, self._address(kind, array, at)).align = kind.dtype.bitwidth // 8

    def rows(self, kind: Any, array: Any, at: Any, stride: Any) -> list[Any]:
        """Eight loads, ``stride`` elements apart."""
        return [self.load(kind, array, self.offset(at, stride, row)) for row in range(LANES)]

    def offset(self, at: Any, stride: Any, row: int) -> Any:
        """``at + row * stride``."""
        return self.ir.add(at, self.ir.mul(stride, ir.Constant(_INDEX, row)))

    def same(self, value: float, like: Any) -> Any:
        """Eight times one number."""
        return ir.Constant(like.type, [value] * LANES)

    def transpose(self, rows: Sequence[Any]) -> list[Any]:
        """Eight rows of eight as eight columns: three rounds of interleaving rows that lie four apart."""
        half = LANES // 2
        index = ir.VectorType(ir.IntType(32), LANES)
        low = ir.Constant(index, [number for pair in range(half) for number in (pair, LANES + pair)])
        high = ir.Constant(index, [number for pair in range(half, LANES) for number in (pair, LANES + pair)])
        columns = list(rows)
        for _ in range(LANES.bit_length() - 1):
            columns = [
                self.ir.shuffle_vector(columns[row], columns[row + half], part)
                for row in range(half)
                for part in (low, high)
            ]
        return columns


def is_float(kind: Any) -> bool:
    """Whether lanes, or an array, hold floats."""
    return isinstance(kind.dtype, types.Float)


@intrinsic
def load(typing: Any, array: Any, at: Any) -> Any:
    """Eight elements of a contiguous array from flat offset ``at``."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return Builder(context, builder).load(signature.args[0], *arguments)

    return Lanes(array.dtype)(array, types.intp), emit


@intrinsic
def store(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """Eight elements into a contiguous array from flat offset ``at``."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        Builder(context, builder).store(signature.args[0], *arguments)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), emit


@intrinsic
def fill(typing: Any, array: Any, value: Any) -> Any:
    """Eight times one number, of the array's type."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.cast(builder, arguments[1], signature.args[1], signature.args[0].dtype)
        vector = ir.VectorType(number.type, LANES)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(first, first, zeros)

    return Lanes(array.dtype)(array, value), emit


def _joined(emit: Callable[[Any, Any, Any, bool], Any]) -> Any:
    @intrinsic
    def operation(typing: Any, one: Any, other: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            one, other = arguments
            return emit(builder, one, other, is_float(signature.args[0]))

        return one(one, other), generate

    return operation


def _less(builder: Any, one: Any, other: Any, floating: bool) -> Any:
    return builder.fcmp_ordered("<", one, other) if floating else builder.icmp_signed("<", one, other)


def _magnitude(builder: Any, value: Any, floating: bool) -> Any:
    zero = ir.Constant(value.type, None)
    minus = builder.fsub(zero, value) if floating else builder.sub(zero, value)
    return builder.select(_less(builder, value, zero, floating), minus, value)


minimum = _joined(lambda b, x, y, floating: b.select(_less(b, x, y, floating), x, y))
maximum = _joined(lambda b, x, y, floating: b.select(_less(b, y, x, floating), x, y))
largest_bits = _joined(lambda b, x, y, floating: y if floating else b.select(b.icmp_unsigned(">", x, y), x, y))
add = _joined(lambda b, x, y, floating: b.fadd(x, y) if floating else b.add(x, y))
subtract = _joined(lambda b, x, y, floating: b.fsub(x, y) if floating else b.sub(x, y))
multiply = _joined(lambda b, x, y, floating: b.fmul(x, y) if floating else b.mul(x, y))
divide = _joined(lambda b, x, y, floating: b.fdiv(x, y) if floating else y)
smaller_magnitude = _joined(
    lambda b, x, y, floating: b.select(_less(b, _magnitude(b, y, floating), _magnitude(b, x, floating), floating), y, x)
)


@intrinsic
def shift_left(typing: Any, value: Any, places: Any) -> Any:
    """Lanes of whole numbers, each moved up by the same number of bits."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, places = arguments
        number = context.cast(builder, places, signature.args[1], signature.args[0].dtype)
        vector = builder.insert_element(ir.Constant(value.type, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shl(value, builder.shuffle_vector(vector, vector, zeros))

    return value(value, places), emit


@intrinsic
def low_half(typing: Any, value: Any) -> Any:
    """The low four bits of each lane."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.and_(arguments[0], ir.Constant(arguments[0].type, [15] * LANES))

    return value(value), emit


@intrinsic
def high_half(typing: Any, value: Any) -> Any:
    """Lanes of bytes, each without its low four bits, which are moved out."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.lshr(arguments[0], ir.Constant(arguments[0].type, [4] * LANES))

    return value(value), emit


@intrinsic
def where_less(typing: Any, one: Any, other: Any, then: Any, otherwise: Any) -> Any:
    """``then`` in the lanes where ``one < other``, else ``otherwise``."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one, other, then, otherwise = arguments
        return builder.select(_less(builder, one, other, is_float(signature.args[0])), then, otherwise)

    return then(one, other, then, otherwise), emit
