"""Products with the decoded weight on the CPU, which is never written as a whole; only channels that hold states count.

A few tokens are multiplied with weights that do not leave the first-level cache; more of them with the decoded weights
of a few groups of outputs at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm.sketch.scale import CHANNEL_MANTISSA, OUTPUT_MANTISSA, decode_scale
from usllm_kernels.cpu.codec import combination, decode_groups, joined_codes, unpacked
from usllm_kernels.cpu.layout import layout
from usllm_kernels.cpu.parallel import side_by_side
from usllm_kernels.cpu.product import product_span

FEW_TOKENS = 4  # beyond, one decoding and the library are faster
_LEAST_SHARED = 1 << 21  # weights; handing over fewer to a second thread takes longer than multiplying them


def sketch_linear(x: Tensor, states: States, plan: Plan) -> Tensor:
    """``x Ŵᵀ``, [tokens, out], in the dtype of ``x`` [tokens, in]."""
    if not plan.blocks or not len(x):
        return x.new_zeros(len(x), plan.shape[0])
    if len(x) <= FEW_TOKENS and x.dtype in (torch.float32, torch.bfloat16):
        return _few_tokens(x, states, plan)
    held = x.index_select(1, plan.channel_order)
    return torch.cat([held @ part.t() for _, part in _parts(states, plan, x.dtype)], 1)


def input_gradient(gradient: Tensor, states: States, plan: Plan) -> Tensor:
    """``dy Ŵ``, [tokens, in], in the dtype of ``gradient`` [tokens, out]; parts are added up in float32."""
    found = torch.zeros(len(gradient), plan.shape[1])
    if plan.blocks:
        total = torch.zeros(len(gradient), plan.num_scales)
        for rows, part in _parts(states, plan, gradient.dtype):
            total += gradient[:, rows] @ part
        found.index_copy_(1, plan.channel_order, total)
    return found.to(gradient.dtype)


def _few_tokens(x: Tensor, states: States, plan: Plan) -> Tensor:
    tables, codes = layout(plan), states["codes"]
    lanes = len(tables.lane_block)
    threads = min(torch.get_num_threads(), lanes) if plan.shape[0] * plan.num_scales >= _LEAST_SHARED else 1
    parts = torch.zeros(threads, len(x), plan.shape[0])
    empty = torch.empty(0, dtype=torch.uint8)
    packed = codes.dtype == torch.uint8
    stream = codes if packed else empty
    unpacked_codes = torch.empty(0, dtype=plan.code_dtype) if packed else codes
    output, output_base = states.get("output_scales", empty), states.get("output_scale_base", empty)
    tokens = x.float().contiguous().numpy()

    def work(part: int) -> None:
        for number, span in enumerate(plan.spans):
            product_span(
                tokens,
                parts[part].numpy(),
                x.dtype == torch.bfloat16,
                stream.numpy(),
                unpacked_codes.numpy(),
                states["scales"].numpy(),
                states["scale_base"].numpy(),
                output.numpy(),
                output_base.numpy(),
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
                joined_codes(unpacked_codes.dtype, plan),
            )

    side_by_side(work, range(threads))
    return (parts.sum(0) if threads > 1 else parts[0]).to(x.dtype)


def _parts(states: States, plan: Plan, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Output rows and their decoded weight [rows, channels with states], a group for each thread at once."""
    codes, scales, output = unpacked(states, plan), _scales(states, plan), _output_scales(states, plan)
    written = dtype if dtype == torch.bfloat16 and not len(output) else torch.float32
    threads = torch.get_num_threads()
    for number, span in enumerate(plan.spans):
        buffer = torch.empty(min(threads, span.groups) * span.size, plan.num_scales, dtype=written)
        for first in range(0, span.groups, threads):
            groups = range(first, min(first + threads, span.groups))

            def work(group: int, number: int = number, first: int = first, buffer: Tensor = buffer) -> None:
                row = (group - first) * plan.spans[number].size
                decode_groups(codes, scales, plan, number, group, 1, buffer, row, held=True)

            side_by_side(work, groups)
            start = span.start + first * span.size
            rows = slice(start, start + len(groups) * span.size)
            part = buffer[: len(groups) * span.size]
            yield rows, (part * output[rows, None] if len(output) else part).to(dtype)


def _scales(states: States, plan: Plan) -> Tensor:
    """What one code unit is worth in each channel with states, fp32, in storage order."""
    value = decode_scale(states["scales"], states["scale_base"], CHANNEL_MANTISSA)
    return value if plan.divisors is None else value / plan.divisors


def _output_scales(states: States, plan: Plan) -> Tensor:
    """fp32 [out], or empty where there are none."""
    if not plan.config.output_scale:
        return torch.empty(0)
    return decode_scale(states["output_scales"], states["output_scale_base"], OUTPUT_MANTISSA)
