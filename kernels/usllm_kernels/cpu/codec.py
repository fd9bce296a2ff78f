"""Projection and query on the CPU, compiled: the same integers as :mod:`usllm.sketch.codec`, at the speed of the cache.

The loops release the interpreter lock, so that layers run side by side (:mod:`usllm.compress.parallel`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from usllm.sketch.codec import States, best_output_scale, channel_scales, store_output_scales
from usllm.sketch.plan import Plan
from usllm.sketch.scale import OUTPUT_MANTISSA, decode_scale
from usllm_kernels.compiled_operators import MINIMUM, TOTAL, combination, reduction
from usllm_kernels.cpu.layout import layout
from usllm_kernels.cpu.parallel import side_by_side
from usllm_kernels.cpu.project import project_span
from usllm_kernels.cpu.query import query_span
from usllm_kernels.cpu.states import channel_sums, choose_scales, output_sums, quantize_states
from usllm_kernels.cpu.stream import unpack_states
from usllm_kernels.tables import best_scales, scale_ratios

_EMPTY_KEY = 2**31 - 1
_CPU = torch.device("cpu")
_WIDER = {torch.int8: torch.int16, torch.int16: torch.int32}


def project(
    weight: Tensor,
    plan: Plan,
    second_moment: Tensor | None = None,
    winners: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> States:
    """:func:`usllm.sketch.project` of an fp32 weight [out, in] on the CPU whose rows are contiguous."""
    if not plan.blocks:
        return plan.state_tensors()
    states = plan.state_tensors(filled=False)
    keys = reduction(plan) == MINIMUM
    values = _values(weight, plan, keys, winners)
    tables = layout(plan)
    channels = plan.num_active
    largest, scales = torch.empty(2, channels, dtype=torch.float32).numpy()
    total, squares = torch.empty(2, channels, dtype=torch.int64).numpy()
    mask, nearest = 0x7FFFFFFE if keys else 0x7FFFFFFF, plan.config.rounding == "nearest"
    channel_sums(values.numpy(), mask, tables.class_sizes, largest.view("int32"), total, squares)
    choose_scales(
        values.numpy(),
        mask,
        largest,
        total,
        squares,
        tables.class_sizes,
        best_scales(plan.config.rounding, _CPU).numpy(),
        scale_ratios(_CPU).numpy(),
        nearest,
        states["scale_base"].numpy(),
        states["scales"].numpy(),
        scales,
    )
    quantize_states(values.numpy(), keys, tables.class_sizes, scales, nearest, states["codes"].numpy())
    if plan.config.output_scale and output_scale is None:
        flat, pitch = flat_view(weight)
        moment = torch.ones(plan.shape[1], dtype=torch.float32) if second_moment is None else second_moment.float()
        of_channels = moment.contiguous()
        product, square = torch.empty(2, plan.shape[0], dtype=torch.float64)
        decoded = decode(states, plan).numpy()
        output_sums(flat.numpy(), pitch, decoded, of_channels.numpy(), product.numpy(), square.numpy())
        output_scale = best_output_scale(product, square)
    if plan.config.output_scale and output_scale is not None:
        store_output_scales(states, output_scale)
    return states


def query(states: States, plan: Plan, dtype: torch.dtype = torch.float32) -> Tensor:
    """:func:`usllm.sketch.query`, in float32 or bfloat16."""
    return decode(states, plan, dtype, output=_output_factors(states, plan))


def project_query(
    weight: Tensor,
    plan: Plan,
    second_moment: Tensor | None,
    dtype: torch.dtype,
    winners: Tensor | None,
    sums: Tensor | None,
    output_scale: Tensor | None = None,
) -> tuple[States, Tensor]:
    """:func:`usllm_kernels.ops.project_query` of an fp32 weight [out, in] on the CPU."""
    states = project(weight, plan, second_moment, winners, output_scale)
    if sums is None:
        return states, query(states, plan, dtype)
    sums.zero_()
    return states, decode(states, plan, dtype, weight, sums, output=_output_factors(states, plan))


def decode(
    states: States,
    plan: Plan,
    dtype: torch.dtype = torch.float32,
    weight: Tensor | None = None,
    sums: Tensor | None = None,
    *,
    output: Tensor | None = None,
) -> Tensor:
    """Decoded weight [out, in].

    Args:
        states: Of the plan.
        plan: A plan.
        dtype: float32 and bfloat16 are written directly, others rounded from float32.
        weight: fp32 [out, in], rows contiguous, to compare with.
        sums: fp32 [2, in]; the sums over outputs of the squared error and of the squared weight are added to it.
        output: Scales of the outputs, fp32 [out]; without them the weights are unscaled.
    """
    if output is None:
        output = torch.ones(plan.shape[0], dtype=torch.float32)
    if not plan.blocks:
        if weight is not None and sums is not None:
            sums += weight.square().sum(0)
        return torch.zeros(plan.shape, dtype=dtype)
    if dtype not in (torch.float32, torch.bfloat16):
        return decode(states, plan, torch.float32, weight, sums, output=output).to(dtype)
    decoded = torch.empty(plan.shape, dtype=dtype)
    codes, scales = unpacked(states, plan), channel_scales(states, plan)

    def work(task: tuple[int, int, int]) -> None:
        span_index, first, groups = task
        span = plan.spans[span_index]
        row = span.start + first * span.size
        decode_groups(codes, scales, output, plan, span_index, first, groups, decoded, row, weight, sums)

    if sums is None:
        side_by_side(work, tasks(plan, torch.get_num_threads() > 1))
    else:  # sums of floats are taken in one order, on one thread
        for task in tasks(plan, False):
            work(task)
    return decoded


def decode_groups(
    codes: Tensor,
    scales: Tensor,
    output: Tensor,
    plan: Plan,
    span_index: int,
    first_group: int,
    groups: int,
    decoded: Tensor,
    row: int,
    weight: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Decode some groups of one span into ``decoded``, float32 or bfloat16 [rows, in], from ``row`` on.

    Args:
        codes: int8 or int16 [states].
        scales: fp32 [in].
        output: fp32 [out].
        plan: A plan with states.
        span_index: Of the span.
        first_group, groups: Which of its groups.
        decoded: Written.
        row: Where the first group goes, and where it lies in ``weight``.
        weight, sums: As for :func:`decode`.
    """
    tables, span = layout(plan), plan.spans[span_index]
    latent, pitch = flat_view(weight) if weight is not None else (torch.empty(0, dtype=torch.float32), 0)
    query_span(
        codes.numpy(),
        scales.numpy(),
        output.numpy(),
        row,
        span.size,
        first_group,
        groups,
        plan.rotation(span),
        plan.rotation_step,
        combination(plan),
        tables.lane_channels,
        tables.lane_block,
        tables.shapes[span_index],
        tables.buckets[span_index],
        joined_codes(codes.dtype, plan),
        latent.numpy(),
        pitch,
        (torch.empty(2, 0, dtype=torch.float32) if sums is None else sums).numpy(),
        (decoded.view(torch.int16) if decoded.dtype == torch.bfloat16 else decoded).numpy(),
    )


def _output_factors(states: States, plan: Plan) -> Tensor | None:
    if not plan.config.output_scale:
        return None
    return decode_scale(states["output_scales"], states["output_scale_base"], OUTPUT_MANTISSA)


def joined_codes(dtype: torch.dtype, plan: Plan) -> Any:
    """An empty array of the type that joined codes of ``dtype`` need."""
    return torch.empty(0, dtype=_WIDER[dtype] if combination(plan) == TOTAL else dtype).numpy()


def unpacked(states: States, plan: Plan) -> Tensor:
    """Codes, int8 or int16 [states], whether packed or not."""
    codes = states["codes"]
    if codes.dtype != torch.uint8:
        return codes
    found = torch.empty(plan.num_states, dtype=plan.code_dtype)
    unpack_states(codes.numpy(), layout(plan).class_sizes, found.numpy())
    return found


def _values(weight: Tensor, plan: Plan, keys: bool, winners: Tensor | None) -> Tensor:
    """Values of the states before quantisation, int32 [states]: keys, or float32 bit patterns."""
    flat, pitch = flat_view(weight)
    tables, width = layout(plan), plan.shape[1]
    values = torch.empty(plan.num_states, dtype=torch.int32 if keys else torch.float32)
    members = torch.empty(0, dtype=torch.int16) if winners is None else winners
    source = (flat.view(torch.int32) if keys else flat).numpy()

    def work(task: tuple[int, int, int]) -> None:
        span_index, first, groups = task
        span = plan.spans[span_index]
        project_span(
            source,
            pitch,
            width,
            span.start + first * span.size,
            span.size,
            first,
            groups,
            plan.rotation(span),
            plan.rotation_step,
            reduction(plan),
            tables.lane_channels,
            tables.lane_block,
            tables.shapes[span_index],
            tables.slots[span_index],
            plan.operator.pad,
            values.numpy(),
            members.numpy(),
        )

    side_by_side(work, tasks(plan, torch.get_num_threads() > 1))
    if not keys:
        return values.view(torch.int32)
    return values.masked_fill_(values == _EMPTY_KEY, 0) if plan.has_empty_states else values


def tasks(plan: Plan, apart: bool) -> list[tuple[int, int, int]]:
    """Span index, first group and number of groups of each task: one group each if ``apart``, else a whole span."""
    if apart:
        return [(span_index, group, 1) for span_index, span in enumerate(plan.spans) for group in range(span.groups)]
    return [(span_index, 0, span.groups) for span_index, span in enumerate(plan.spans)]


def flat_view(weight: Tensor) -> tuple[Tensor, int]:
    """A matrix as a vector, and the elements from one row to the next; copied where its rows are not contiguous."""
    if weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
        weight = weight.contiguous()
    length = (weight.shape[0] - 1) * weight.stride(0) + weight.shape[1]
    return weight.as_strided((length,), (1,)), weight.stride(0)
