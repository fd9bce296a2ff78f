"""AbsMaxMin on the CPU, compiled: the same integers as :mod:`usllm.sketch.codec`, several times faster.

The torch reference is many small operations a class; here a channel is read once, and all its buckets are filled while
it lies in the first-level cache. Used where numba is installed; ``USLLM_CPU_KERNELS`` set to ``torch`` keeps to the
reference, set to ``numba`` insists. The kernels release the interpreter lock, so that layers run side by side
(:mod:`usllm.nn.parallel`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from usllm.sketch.operators.absmaxmin import AbsMaxMin
from usllm.sketch.plan import Plan

VARIABLE = "USLLM_CPU_KERNELS"


def usable(plan: Plan, device: torch.device) -> bool:
    """Whether the compiled kernels take this plan on this device.

    Raises:
        ValueError: ``USLLM_CPU_KERNELS`` is unknown, or asks for numba where it cannot run.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "numba", "torch"):
        raise ValueError(f"{VARIABLE}={wanted}: unknown; set it to auto, numba or torch")
    if wanted == "torch" or device.type != "cpu":
        return False
    if wanted == "numba" and _kernels() is None:
        raise ValueError(f"{VARIABLE}=numba, but numba is not installed: pip install numba")
    fits = isinstance(plan.operator, AbsMaxMin) and plan.config.query == "magnitude_max" and bool(plan.blocks)
    return fits and _kernels() is not None


@lru_cache(maxsize=1)
def _kernels() -> tuple[Callable[..., None], Callable[..., None]] | None:
    try:
        from usllm.sketch import compiled_kernels
    except ImportError:
        return None
    return compiled_kernels.project_group, compiled_kernels.query_span


class SpanTables(NamedTuple):
    """A plan's integers for one span, as flat arrays (NumPy views of tensors).

    Attributes:
        channel_class: Block number of each channel, -1 without states, int16 [in].
        channel_first: First state of each channel in this span, int64 [in].
        shape: Rows, states, slots and the table's offsets for each block, int64 [blocks, 5].
        slots: Members of the buckets of all blocks, uint16.
        buckets: Bucket of each rotated position, all blocks, uint16.
    """

    channel_class: Any
    channel_first: Any
    shape: Any
    slots: Any
    buckets: Any


def bucket_keys(weight: Tensor, plan: Plan, winners: Tensor | None = None) -> Tensor:
    """Encoded states before quantisation, int32 [states]; what the reference's reduction gives.

    Args:
        weight: fp32 [out, in] on the CPU.
        plan: A plan that is :func:`usable`.
        winners: int16 [states], written, as for :func:`usllm.sketch.project`.
    """
    kernels = _kernels()
    assert kernels is not None
    members = torch.empty(plan.num_states, dtype=torch.int16) if winners is None else winners
    keys = torch.empty(plan.num_states, dtype=torch.int32)
    bits = weight.view(torch.int32)
    for span, tables in zip(plan.spans, _tables(plan), strict=True):
        for group in range(span.groups):
            start = span.start + group * span.size
            columns = bits[start : start + span.size].t().contiguous()
            rotation = plan.rotation(span) + group * plan.shape[1]
            kernels[0](columns.numpy(), group, rotation, *tables[:4], keys.numpy(), members.numpy())
    return keys


def decode(codes: Tensor, scales: Tensor, plan: Plan) -> Tensor:
    """Decoded weight, fp32 [out, in].

    Args:
        codes: int8 or int16 [states].
        scales: fp32 [in].
        plan: A plan that is :func:`usable`.
    """
    kernels = _kernels()
    assert kernels is not None
    decoded = torch.empty(plan.shape)
    for span, tables in zip(plan.spans, _tables(plan), strict=True):
        table = (tables.channel_class, tables.channel_first, tables.shape, tables.buckets)
        place = (span.start, span.size, span.groups, plan.rotation(span))
        kernels[1](codes.numpy(), scales.numpy(), *place, *table, decoded.numpy())
    return decoded


def _tables(plan: Plan) -> list[SpanTables]:
    kept: list[SpanTables] | None = plan.__dict__.get("_compiled_tables")
    if kept is None:
        kept = plan.__dict__["_compiled_tables"] = [_span_tables(plan, number) for number in range(len(plan.spans))]
    return kept


def _span_tables(plan: Plan, number: int) -> SpanTables:
    span = plan.spans[number]
    channel_class = torch.full((plan.shape[1],), -1, dtype=torch.int16)
    channel_first = torch.zeros(plan.shape[1], dtype=torch.int64)
    shape, slots, buckets = [], [], []
    slot_offset = bucket_offset = 0
    for index, block in enumerate(plan.blocks):
        choice = block.choice
        before = sum(s.groups * choice.rows * min(choice.states, s.size) for s in plan.spans[:number])
        channel_class[block.channels] = index
        channel_first[block.channels] = (
            block.first_state + before + torch.arange(len(block.channels)) * block.states_per_channel
        )
        placement = plan.placement(choice, span.size)
        shape.append((*placement.slots.shape, slot_offset, bucket_offset))
        slots.append(placement.slots.flatten())
        buckets.append(placement.buckets.flatten())
        slot_offset += slots[-1].numel()
        bucket_offset += buckets[-1].numel()
    # Unsigned: an index that could be below zero would be checked for it at every use.
    tables = (torch.cat(slots).numpy().view("uint16"), torch.cat(buckets).numpy().view("uint16"))
    return SpanTables(channel_class.numpy(), channel_first.numpy(), torch.tensor(shape).numpy(), *tables)
