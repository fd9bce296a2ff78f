"""Bits of a word as 32 numbers side by side: one of two for each.

A machine with AVX-512 takes a word as the mask of one instruction; LLVM finds what others do.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from usllm_kernels.cpu.lanes import intrinsic
from usllm_kernels.planes import COLUMNS


@intrinsic
def store_signs(typing: Any, words: Any, at: Any, positive: Any, negative: Any, signs: Any, to: Any) -> Any:
    """``positive`` where a bit of the word at flat offset ``at`` is 1, else ``negative``, from offset ``to`` on.

    ``words`` are int32, ``signs`` int16 or int32, of which both numbers are low bits; both are contiguous.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, at, positive, negative, signs, to = arguments
        kinds = signature.args

        def place(number: int, array: Any, at: Any) -> Any:
            return builder.gep(context.make_array(kinds[number])(context, builder, array).data, [at])

        element = context.get_value_type(kinds[4].dtype)
        vector = ir.VectorType(element, COLUMNS)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), COLUMNS), [0] * COLUMNS)

        def everywhere(number: int, value: Any) -> Any:
            low = context.cast(builder, value, kinds[number], kinds[4].dtype)
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), low, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(first, first, zeros)

        bits = builder.bitcast(builder.load(place(0, words, at)), ir.VectorType(ir.IntType(1), COLUMNS))
        chosen = builder.select(bits, everywhere(2, positive), everywhere(3, negative))
        builder.store(chosen, builder.bitcast(place(4, signs, to), vector.as_pointer())).align = element.width // 8
        return context.get_dummy_value()

    return types.void(words, types.intp, positive, negative, signs, types.intp), emit
