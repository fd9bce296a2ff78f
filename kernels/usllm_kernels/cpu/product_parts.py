"""Products of a few tokens with states as jobs (:mod:`usllm_kernels.cpu.team`), one for each pair of integer types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray

from usllm.sketch.plan import Plan
from usllm_kernels.compiled_operators import combination
from usllm_kernels.cpu.codec import joined_codes
from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.layout import Layout, layout
from usllm_kernels.cpu.product import product_span
from usllm_kernels.cpu.team import BEFORE, codes_of_bytes, floats, my_part, part_of_a_job, pointer
from usllm_kernels.plan_cache import cached_by_plan


@compiled
def _product_part(job: Any, codes: Any, joined: Any) -> None:
    """:func:`product_span` of this thread's share of the lane blocks, which is added up in a place of its own.

    A job's numbers: tokens, inputs, outputs, whether weights are rounded to bfloat16, whether codes are packed, and of
    how many elements they are; elements of both sorts of scales; those of :class:`Spans`; addresses of ``x``, of
    what is raised (float32 [parts, tokens, out]), codes, scales, their base, output scales and their base; addresses of
    :class:`Spans`.

    ``codes`` and ``joined`` are read for their types alone.
    """
    given = carray(job, (BEFORE + 28,))
    tokens, inputs, outputs, rounded, packed, count, channels, of_outputs = given[BEFORE : BEFORE + 8]
    start, n, groups, rotation, step, combine, lanes, classes, buckets = given[BEFORE + 8 : BEFORE + 17]
    part, parts = my_part(given)
    own = given[BEFORE + 18] + part * tokens * outputs * np.int64(4)
    product_span(
        floats(given[BEFORE + 17], (tokens, inputs)),
        floats(own, (tokens, outputs)),
        rounded != 0,
        codes_of_bytes(given[BEFORE + 19], (count if packed else 0,)),
        carray(pointer(given[BEFORE + 19]), (0 if packed else count,), codes.dtype),
        codes_of_bytes(given[BEFORE + 20], (channels,)),
        codes_of_bytes(given[BEFORE + 21], (1,)),
        codes_of_bytes(given[BEFORE + 22], (of_outputs,)),
        codes_of_bytes(given[BEFORE + 23], (1,)),
        start,
        n,
        groups,
        rotation,
        step,
        combine,
        lanes * part // parts,
        lanes * (part + 1) // parts,
        carray(pointer(given[BEFORE + 24]), (lanes, 8), np.int64),
        carray(pointer(given[BEFORE + 25]), (lanes, 7), np.int64),
        carray(pointer(given[BEFORE + 26]), (classes, 6), np.int64),
        carray(pointer(given[BEFORE + 27]), (buckets,), np.uint16),
        joined,
    )


@part_of_a_job
def _narrow_joined_narrow(job: Any) -> None:
    _product_part(job, np.empty(0, np.int8), np.empty(0, np.int8))


@part_of_a_job
def _narrow_joined_wide(job: Any) -> None:
    _product_part(job, np.empty(0, np.int8), np.empty(0, np.int16))


@part_of_a_job
def _wide_joined_wide(job: Any) -> None:
    _product_part(job, np.empty(0, np.int16), np.empty(0, np.int16))


@part_of_a_job
def _wide_joined_wider(job: Any) -> None:
    _product_part(job, np.empty(0, np.int16), np.empty(0, np.int32))


_PARTS: dict[tuple[torch.dtype, str], Callable[[], Any]] = {
    (torch.int8, "int8"): _narrow_joined_narrow,
    (torch.int8, "int16"): _narrow_joined_wide,
    (torch.int16, "int16"): _wide_joined_wide,
    (torch.int16, "int32"): _wide_joined_wider,
}
"""For a type of codes and one of joined codes."""


class Spans(NamedTuple):
    """What the jobs of one plan are told.

    Attributes:
        part: What each thread does.
        numbers: Of each span: first output, outputs of a group, groups, rotation, its step, how rows are joined, blocks
            of lanes, classes, and buckets.
        tables: Of each span: addresses of the channels and the numbers of blocks of lanes, of classes and of buckets.
        blocks: Of lanes: no more parts have anything to do.
        kept: What lies at those addresses.
    """

    part: Callable[[], Any]
    numbers: list[tuple[int, ...]]
    tables: list[tuple[int, ...]]
    blocks: int
    kept: Layout


@cached_by_plan
def spans_of(plan: Plan) -> Spans:
    """Of a plan with states."""
    made, part = layout(plan), _PARTS[plan.code_dtype, joined_codes(plan.code_dtype, plan).dtype.name]
    numbers: list[tuple[int, ...]] = []
    tables: list[tuple[int, ...]] = []
    lanes = len(made.lane_block)
    how = plan.rotation_step, combination(plan)
    for span, shape, buckets in zip(plan.spans, made.shapes, made.buckets, strict=True):
        sizes = lanes, len(shape), buckets.size
        numbers.append((span.start, span.size, span.groups, plan.rotation(span), *how, *sizes))
        tables.append(tuple(array.ctypes.data for array in (made.lane_channels, made.lane_block, shape, buckets)))
    return Spans(part, numbers, tables, lanes, made)
