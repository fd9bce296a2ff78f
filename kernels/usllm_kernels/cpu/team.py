"""Parts of one product on the very threads that torch computes with.

A product of one token takes less time than waking a thread. Torch's own threads (OpenMP's) go on looking for work for a
while after each of its operations, and take up in a microsecond what they are given; threads beside them would have to
share their cores with them. So parts are given to OpenMP in the library that torch itself is linked with.

OpenMP calls a C function with one address and no array. What a part works on is therefore written as numbers, a *job*:
int64, of which the first three say who does which part, and the others are addresses and sizes that its function knows.
Where torch has no such threads, a pool of Python's does the same jobs (:mod:`usllm_kernels.cpu.parallel`).
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types

from usllm_kernels.cpu.compiled import compiled, compiled_callback
from usllm_kernels.cpu.lanes import intrinsic

T = TypeVar("T")

CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
"""What a part is to C."""
BEFORE = 3
"""How many numbers of a job come first: whether the next two are functions to ask; which part, and of how many."""

_forked: list[bool] = []
if hasattr(os, "register_at_fork"):  # elsewhere there is no fork
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


class Team(NamedTuple):
    """OpenMP's call, and the addresses of the functions that tell a thread its number and how many there are."""

    begin: Any
    who: tuple[int, int]

    def threads(self, size: int, least: int) -> int:
        """As many as torch uses in this one for work of at least that size; below, asking them takes longer."""
        return torch.get_num_threads() if size >= least else 1

    def run(self, part: Callable[[], Any], numbers: Iterable[int], threads: int) -> None:
        """Do a job on some threads, each of which does its part; one of them is the caller's.

        Args:
            part: Gives the function, made by :func:`part_of_a_job`.
            numbers: Of the job, behind those that say who does which part.
            threads: At most; a part asks how many there are.
        """
        job = array("q", (1, *self.who, *numbers))
        function = part()
        self.begin(function.address, job.buffer_info()[0], threads, 0)

    def call(self, work: Callable[[T], object], tasks: Sequence[T], threads: int) -> None:
        """Do ``work`` on every task, each on the next thread that is free. For what is worth some 50 microseconds.

        Args:
            work: Python that gives the interpreter's lock back in what it compiled.
            tasks: In any order.
            threads: At most.

        Raises:
            BaseException: The first that ``work`` raised; tasks that nobody had begun are left then.
        """
        left, raised = iter(tasks), list[BaseException]()

        def part(_: int | None) -> None:
            try:
                for task in left:
                    if raised:
                        return
                    work(task)
            except BaseException as error:  # C code cannot pass it on
                raised.append(error)

        self.begin(CALLBACK(part), None, threads, 0)
        part(None)  # what is left where an interrupt met a thread before its first task
        if raised:
            raise raised[0]


def team_of_torch() -> Team | None:
    """Torch's threads; ``None`` where they are not OpenMP's, and in a forked process, where they are no more."""
    return None if _forked else _found()


@lru_cache(maxsize=1)
def _found() -> Team | None:
    library = next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))), None)
    if library is None or not torch.backends.openmp.is_available():
        return None
    try:
        known = ctypes.CDLL(str(library))  # finds what torch is linked with, whatever else the process has loaded
        begin, who = known.GOMP_parallel, (known.omp_get_thread_num, known.omp_get_num_threads)
    except (OSError, AttributeError):
        return None
    begin.argtypes, begin.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    number, count = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in who)
    return Team(begin, (number, count))


def part_of_a_job(function: Callable[[Any], None]) -> Callable[[], Any]:
    """Have ``function(job)`` be compiled, at its first use, to what :class:`Team` runs."""

    @lru_cache(maxsize=1)
    def compiled_part() -> Any:
        return compiled_callback(function, types.void(types.CPointer(types.int64)))

    return compiled_part


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An address as what ``carray`` reads an array from."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), emit


@intrinsic
def _asked(typing: Any, address: Any) -> Any:
    """What the C function at an address says, an int."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])

    return types.int32(types.int64), emit


@compiled
def my_part(job: Any) -> Any:
    """Which of a job's parts is this thread's, and how many there are.

    Args:
        job: Its numbers.
    """
    part, parts = job[1], job[2]
    if job[0]:
        part, parts = np.int64(_asked(part)), np.int64(_asked(parts))
    return part, parts


@compiled
def my_share(job: Any, things: int) -> Any:
    """First and last of ``things`` that are for the thread that does this part."""
    part, parts = my_part(job)
    return things * part // parts, things * (part + 1) // parts


@compiled
def floats(address: int, shape: Any) -> Any:
    """An array of float32."""
    return carray(pointer(address), shape, np.float32)


@compiled
def whole_numbers(address: int, shape: Any) -> Any:
    """An array of int32."""
    return carray(pointer(address), shape, np.int32)


@compiled
def halves(address: int, shape: Any) -> Any:
    """An array of int16, the bits of bfloat16."""
    return carray(pointer(address), shape, np.int16)


@compiled
def codes_of_bytes(address: int, shape: Any) -> Any:
    """An array of uint8."""
    return carray(pointer(address), shape, np.uint8)
