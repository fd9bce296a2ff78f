"""Products with the decoded weight on the CPU, which is never written as a whole; only channels that hold states count.

A few tokens are multiplied with weights that do not leave the first-level cache; more of them by the library, with the
decoded weights of a few groups of outputs at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.cpu.codec import combination, joined_codes
from usllm_kernels.cpu.layout import layout
from usllm_kernels.cpu.parallel import side_by_side
from usllm_kernels.cpu.product import product_span, weights_by_channel

FEW_TOKENS = 4  # beyond, one decoding and the library are faster
_PADDING = 64
_LEAST_SHARED = 1 << 21  # weights; handing over fewer to a second thread takes longer than multiplying them


def sketch_linear(x: Tensor, states: States, plan: Plan) -> Tensor:
    """``x Ŵᵀ``, [tokens, out], in the dtype of ``x`` [tokens, in]; other numbers of threads add up in other orders."""
    if not plan.blocks or not len(x):
        return x.new_zeros(len(x), plan.shape[0])
    if len(x) <= FEW_TOKENS and x.dtype in (torch.float32, torch.bfloat16):
        return _few_tokens(x, states, plan)
    held = x.new_zeros(len(x), _padded(plan))
    held[:, : plan.num_scales] = x.index_select(1, plan.channel_order)
    return torch.cat([product for _, part in _parts(states, plan, x.dtype) for product in held @ part], 1)


def input_gradient(gradient: Tensor, states: States, plan: Plan) -> Tensor:
    """``dy Ŵ``, [tokens, in], in the dtype of ``gradient`` [tokens, out]; parts are added up in float32."""
    found = torch.zeros(len(gradient), plan.shape[1])
    if plan.blocks:
        total = torch.zeros(len(gradient), _padded(plan))
        for start, part in _parts(states, plan, gradient.dtype):
            for number, weights in enumerate(part):
                first = start + number * weights.shape[1]
                total += gradient[:, first : first + weights.shape[1]] @ weights.t()
        found.index_copy_(1, plan.channel_order, total[:, : plan.num_scales])
    return found.to(gradient.dtype)


class _Stored(NamedTuple):
    """States as the compiled loops take them: what is not there is empty."""

    stream: Any
    codes: Any
    scales: Any
    scale_base: Any
    output_scales: Any
    output_scale_base: Any


def _stored(states: States, plan: Plan) -> _Stored:
    codes, none = states["codes"], torch.empty(0, dtype=torch.uint8)
    packed = codes.dtype == torch.uint8
    return _Stored(
        (codes if packed else none).numpy(),
        (torch.empty(0, dtype=plan.code_dtype) if packed else codes).numpy(),
        states["scales"].numpy(),
        states["scale_base"].numpy(),
        states.get("output_scales", none).numpy(),
        states.get("output_scale_base", none).numpy(),
    )


def _few_tokens(x: Tensor, states: States, plan: Plan) -> Tensor:
    tables, stored, joined = layout(plan), _stored(states, plan), joined_codes(plan.code_dtype, plan)
    lanes = len(tables.lane_block)
    threads = min(torch.get_num_threads(), lanes) if plan.shape[0] * plan.num_scales >= _LEAST_SHARED else 1
    parts = torch.zeros(threads, len(x), plan.shape[0])
    tokens = x.float().contiguous().numpy()

    def work(part: int) -> None:
        for number, span in enumerate(plan.spans):
            product_span(
                tokens,
                parts[part].numpy(),
                x.dtype == torch.bfloat16,
                *stored,
                span.start,
                span.size,
                span.groups,
                plan.rotation(span),
                plan.turns,
                combination(plan),
                lanes * part // threads,
                lanes * (part + 1) // threads,
                tables.lane_channels,
                tables.lane_block,
                tables.shapes[number],
                tables.buckets[number],
                joined,
            )

    side_by_side(work, range(threads))
    return (parts.sum(0) if threads > 1 else parts[0]).to(x.dtype)


def _parts(states: States, plan: Plan, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """First output row and decoded weights of a few groups, [groups, padded channels, n], one group for each thread."""
    tables, stored, joined = layout(plan), _stored(states, plan), joined_codes(plan.code_dtype, plan)
    threads = torch.get_num_threads()
    written = dtype if dtype == torch.bfloat16 else torch.float32
    for number, span in enumerate(plan.spans):
        buffer = torch.empty(min(threads, span.groups), _padded(plan), span.size, dtype=written)
        buffer[:, plan.num_scales :] = 0.0
        into = (buffer.view(torch.int16) if written == torch.bfloat16 else buffer).numpy()
        for first in range(0, span.groups, threads):
            groups = range(first, min(first + threads, span.groups))

            def work(group: int, number: int = number, first: int = first, into: Any = into) -> None:
                span = plan.spans[number]
                weights_by_channel(
                    into[group - first],
                    *stored,
                    span.start + group * span.size,
                    span.size,
                    group,
                    plan.rotation(span),
                    plan.turns,
                    plan.shape[1],
                    combination(plan),
                    tables.lane_channels,
                    tables.lane_block,
                    tables.shapes[number],
                    tables.buckets[number],
                    joined,
                )

            side_by_side(work, groups)
            yield span.start + first * span.size, buffer[: len(groups)].to(dtype)


def _padded(plan: Plan) -> int:
    """Channels with states, and some more so that layers have few different shapes.

    The library keeps compiled code for every shape that it has multiplied, some 0.6 MB for each.
    """
    return -(-plan.num_scales // _PADDING) * _PADDING
