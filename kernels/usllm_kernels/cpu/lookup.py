"""Sums of table entries that the bits of words choose: the inner loop of products with bit planes.

Four columns of signs have 16 sums ``±a ±b ±c ±d``. A table of them fits one register, and an instruction that permutes
a register by the low bits of another looks up 16 outputs at once. A word of 32 bits holds eight such choices: shift,
permute, add.

LLVM finds none of this by itself, so the loop is written in its instructions, once for each set of them that a machine
may have. All of them add up in the same order, so that every machine gets the same bits.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types

from usllm_kernels.cpu.lanes import intrinsic
from usllm_kernels.planes import OUTPUTS

TABLE = 16
"""Entries of a table: the sums of four columns."""
TABLES = 8
"""Of a word."""
_INDEX, _WORD, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()


class _Avx512:
    """16 outputs a register, a table in one."""

    lanes = 16

    def table(self, builder: Any, address: Any) -> Any:
        """A table, kept in registers for all outputs."""
        return _load(builder, address, _FLOAT, TABLE)

    def choose(self, builder: Any, table: Any, words: Any) -> Any:
        """Entries of the table that the low four bits of each word choose."""
        return _called(builder, "llvm.x86.avx512.permvar.sf.512", table, words)


class _Avx2:
    """Eight outputs a register; of the two halves of a table the fourth bit chooses."""

    lanes = 8

    def table(self, builder: Any, address: Any) -> Any:
        """The table's halves."""
        high = builder.gep(address, [ir.Constant(_INDEX, TABLE // 2)])
        return [_load(builder, start, _FLOAT, TABLE // 2) for start in (address, high)]

    def choose(self, builder: Any, table: Any, words: Any) -> Any:
        """Entries of the table that the low four bits of each word choose."""
        low, high = (_called(builder, "llvm.x86.avx2.permps", half, words) for half in table)
        fourth = builder.shl(words, ir.Constant(words.type, [28] * self.lanes))
        return builder.select(builder.icmp_signed("<", fourth, ir.Constant(words.type, [0] * self.lanes)), high, low)


class _Plain:
    """Any machine: one load for each output."""

    lanes = 8

    def table(self, builder: Any, address: Any) -> Any:
        """Where the table lies."""
        return address

    def choose(self, builder: Any, table: Any, words: Any) -> Any:
        """Entries of the table that the low four bits of each word choose."""
        found = ir.Constant(ir.VectorType(_FLOAT, self.lanes), ir.Undefined)
        kept = builder.and_(words, ir.Constant(words.type, [TABLE - 1] * self.lanes))
        for lane in range(self.lanes):
            place = ir.Constant(_WORD, lane)
            number = builder.extract_element(kept, place)
            found = builder.insert_element(found, builder.load(builder.gep(table, [number])), place)
        return found


INSTRUCTIONS: dict[str, Any] = {"avx512f": _Avx512(), "avx2": _Avx2(), "": _Plain()}
"""By the feature of a processor that they need, the fastest first."""


def machine_instructions() -> str:
    """Which of :data:`INSTRUCTIONS` this processor has."""
    has = binding.get_host_cpu_features()
    return next(feature for feature in INSTRUCTIONS if not feature or has.get(feature))


def table_sums(feature: str) -> Any:
    """What a compiled function calls as ``sums(words, at_word, tables, at_table, count, found, at)``.

    ``words`` are int32 [count, 64] from offset ``at_word`` on, ``tables`` float32 [count, 8, 16] from ``at_table`` on;
    written are the 64 sums at ``found`` from offset ``at`` on. ``count`` is at least 1.

    Args:
        feature: A key of :data:`INSTRUCTIONS`.
    """
    by = INSTRUCTIONS[feature]
    registers = OUTPUTS // by.lanes

    @intrinsic
    def sums(typing: Any, words: Any, at_word: Any, tables: Any, at_table: Any, count: Any, found: Any, at: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            words, at_word, tables, at_table, count, found, at = arguments

            def place(number: int, array: Any, at: Any) -> Any:
                data = context.make_array(signature.args[number])(context, builder, array).data
                return builder.gep(data, [at])

            first, table, into = place(0, words, at_word), place(2, tables, at_table), place(5, found, at)
            before = builder.block
            loop, done = builder.append_basic_block("words"), builder.append_basic_block("summed")
            builder.branch(loop)
            builder.position_at_end(loop)
            row = builder.phi(_INDEX)
            vector = ir.VectorType(_FLOAT, by.lanes)
            totals = [builder.phi(vector) for _ in range(registers)]
            row.add_incoming(ir.Constant(_INDEX, 0), before)
            for total in totals:
                total.add_incoming(ir.Constant(vector, [0.0] * by.lanes), before)
            sums = list(totals)
            start = builder.mul(row, ir.Constant(_INDEX, OUTPUTS))
            chosen = [
                _load(builder, builder.gep(first, [_plus(builder, start, by.lanes * number)]), _WORD, by.lanes)
                for number in range(registers)
            ]
            start = builder.mul(row, ir.Constant(_INDEX, TABLES * TABLE))
            for number in range(TABLES):
                entries = by.table(builder, builder.gep(table, [_plus(builder, start, TABLE * number)]))
                for register in range(registers):
                    word = chosen[register]
                    if number:
                        word = builder.lshr(word, ir.Constant(word.type, [4 * number] * by.lanes))
                    sums[register] = builder.fadd(sums[register], by.choose(builder, entries, word))
            following = _plus(builder, row, 1)
            row.add_incoming(following, loop)
            for total, summed in zip(totals, sums, strict=True):
                total.add_incoming(summed, loop)
            builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
            builder.position_at_end(done)
            for register, summed in enumerate(sums):
                to = builder.gep(into, [ir.Constant(_INDEX, by.lanes * register)])
                builder.store(summed, builder.bitcast(to, vector.as_pointer())).align = 4
            return context.get_dummy_value()

        offsets = types.intp
        return types.void(words, offsets, tables, offsets, offsets, found, offsets), emit

    return sums


def _plus(builder: Any, value: Any, number: int) -> Any:
    return builder.add(value, ir.Constant(_INDEX, number))


def _load(builder: Any, address: Any, element: Any, count: int) -> Any:
    found = builder.load(builder.bitcast(address, ir.VectorType(element, count).as_pointer()))
    found.align = 4
    return found


def _called(builder: Any, name: str, *arguments: Any) -> Any:
    kind = ir.FunctionType(arguments[0].type, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)
