"""Products with the decoded weight on the CPU, without channels that hold no states; no whole weight is written.

For a few tokens, weights do not leave the first-level cache. For more, torch multiplies with the decoded weights of a
few groups of outputs at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.compiled_operators import combination
from usllm_kernels.cpu.codec import joined_codes
from usllm_kernels.cpu.layout import layout
from usllm_kernels.cpu.parallel import side_by_side, workers
from usllm_kernels.cpu.product import weights_by_channel
from usllm_kernels.cpu.product_parts import spans_of

FEW_TOKENS = 4  # beyond, decoding once and torch's product are faster
_PADDING = 64
_LEAST_SHARED = 1 << 18  # weights; below, asking a second thread takes longer than it saves
_NONE = torch.empty(0, dtype=torch.uint8)


def sketch_linear(x: Tensor, states: States, plan: Plan) -> Tensor:
    """``x Ŵᵀ``, [tokens, out], in the dtype of ``x`` [tokens, in].

    The order of summation depends on the number of threads.
    """
    if not plan.blocks or not len(x):
        return x.new_zeros(len(x), plan.shape[0])
    if len(x) <= FEW_TOKENS and x.dtype in (torch.float32, torch.bfloat16):
        return _few_tokens(x, states, plan)
    held = x.new_zeros(len(x), _padded(plan))
    held[:, : plan.num_active] = x.index_select(1, plan.channel_order)
    return torch.cat([product for _, part in _parts(states, plan, x.dtype) for product in held @ part], 1)


def input_gradient(gradient: Tensor, states: States, plan: Plan) -> Tensor:
    """``dy Ŵ``, [tokens, in], in the dtype of ``gradient`` [tokens, out]; parts are added up in float32."""
    found = torch.zeros(len(gradient), plan.shape[1], dtype=torch.float32)
    if plan.blocks:
        total = torch.zeros(len(gradient), _padded(plan), dtype=torch.float32)
        for start, part in _parts(states, plan, gradient.dtype):
            for group, weights in enumerate(part):
                first = start + group * weights.shape[1]
                total += gradient[:, first : first + weights.shape[1]] @ weights.t()
        found.index_copy_(1, plan.channel_order, total[:, : plan.num_active])
    return found.to(gradient.dtype)


class _Stored(NamedTuple):
    """States as the compiled loops take them: absent tensors are passed as empty ones."""

    stream: Any
    codes: Any
    scales: Any
    scale_base: Any
    output_scales: Any
    output_scale_base: Any


def _read(states: States, plan: Plan) -> list[Tensor]:
    """Codes, scales and their base, output scales and their base: those that the plan has, and empty ones."""
    of_outputs = ("output_scales", "output_scale_base") if plan.config.output_scale else ()
    found = [states[name] for name in ("codes", "scales", "scale_base", *of_outputs)]
    return found if of_outputs else [*found, _NONE, _NONE]


def _stored(states: States, plan: Plan) -> _Stored:
    codes, *others = _read(states, plan)
    packed = codes.dtype == torch.uint8
    stream, whole = (codes, torch.empty(0, dtype=plan.code_dtype)) if packed else (_NONE, codes)
    return _Stored(*(tensor.numpy() for tensor in (stream, whole, *others)))


def _few_tokens(x: Tensor, states: States, plan: Plan) -> Tensor:
    spans, by = spans_of(plan), workers()
    stored = codes, scales, _, output_scales, _ = _read(states, plan)
    threads = min(by.threads(plan.shape[0] * plan.num_active, _LEAST_SHARED), spans.blocks)
    tokens = x.float().contiguous()
    parts = tokens.new_zeros(threads, len(x), plan.shape[0])
    sizes = len(x), *plan.shape[::-1], int(x.dtype == torch.bfloat16), int(codes.dtype == torch.uint8)
    counts = codes.numel(), scales.numel(), output_scales.numel()
    addresses = [tensor.data_ptr() for tensor in (tokens, parts, *stored)]
    for numbers, tables in zip(spans.numbers, spans.tables, strict=True):
        by.run(spans.part, (*sizes, *counts, *numbers, *addresses, *tables), threads)
    return (parts.sum(0) if threads > 1 else parts[0]).to(x.dtype)


def _parts(states: States, plan: Plan, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """First output row and decoded weights of a few groups, [groups, padded channels, n], one group for each thread."""
    tables, stored, joined = layout(plan), _stored(states, plan), joined_codes(plan.code_dtype, plan)
    threads = torch.get_num_threads()
    written = dtype if dtype == torch.bfloat16 else torch.float32
    for span_index, span in enumerate(plan.spans):
        buffer = torch.empty(min(threads, span.groups), _padded(plan), span.size, dtype=written)
        buffer[:, plan.num_active :] = 0.0
        into = (buffer.view(torch.int16) if written == torch.bfloat16 else buffer).numpy()
        for first in range(0, span.groups, threads):
            groups = range(first, min(first + threads, span.groups))

            def work(group: int, span_index: int = span_index, first: int = first, into: Any = into) -> None:
                span = plan.spans[span_index]
                weights_by_channel(
                    into[group - first],
                    *stored,
                    span.start + group * span.size,
                    span.size,
                    group,
                    plan.rotation(span),
                    plan.rotation_step,
                    plan.shape[1],
                    combination(plan),
                    tables.lane_channels,
                    tables.lane_block,
                    tables.shapes[span_index],
                    tables.buckets[span_index],
                    joined,
                )

            side_by_side(work, groups)
            yield span.start + first * span.size, buffer[: len(groups)].to(dtype)


def _padded(plan: Plan) -> int:
    """Channels with states, and some more so that layers have few different shapes.

    torch's library keeps compiled code for every shape that it has multiplied, some 0.6 MB for each.
    """
    return -(-plan.num_active // _PADDING) * _PADDING
