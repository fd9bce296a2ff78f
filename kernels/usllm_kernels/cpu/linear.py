"""Products with the decoded weight on the CPU, a few groups of outputs at a time: the whole of it never exists."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States, channel_scales
from usllm.sketch.scale import OUTPUT_MANTISSA, decode_scale
from usllm_kernels.cpu.codec import decode_groups, unpacked
from usllm_kernels.cpu.parallel import side_by_side


def sketch_linear(x: Tensor, states: States, plan: Plan) -> Tensor:
    """``x Ŵᵀ``, [tokens, out], in the dtype of ``x`` [tokens, in]."""
    if not plan.blocks:
        return x.new_zeros(len(x), plan.shape[0])
    return torch.cat([x @ part.t() for _, part in _parts(states, plan, x.dtype)], 1)


def input_gradient(gradient: Tensor, states: States, plan: Plan) -> Tensor:
    """``dy Ŵ``, [tokens, in], in the dtype of ``gradient`` [tokens, out]; parts are added up in float32."""
    total = torch.zeros(len(gradient), plan.shape[1])
    if plan.blocks:
        for rows, part in _parts(states, plan, gradient.dtype):
            total += gradient[:, rows] @ part
    return total.to(gradient.dtype)


def _parts(states: States, plan: Plan, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Output rows and the decoded weight of these rows [rows, in], as many groups at once as torch has threads."""
    codes, scales = unpacked(states, plan), channel_scales(states, plan)
    written = dtype if dtype == torch.bfloat16 and not plan.config.output_scale else torch.float32
    output = None
    if plan.config.output_scale:
        output = decode_scale(states["output_scales"], states["output_scale_base"], OUTPUT_MANTISSA)
    threads = torch.get_num_threads()
    for number, span in enumerate(plan.spans):
        buffer = torch.empty(min(threads, span.groups) * span.size, plan.shape[1], dtype=written)
        for first in range(0, span.groups, threads):
            groups = range(first, min(first + threads, span.groups))

            def work(group: int, number: int = number, first: int = first, buffer: Tensor = buffer) -> None:
                row = (group - first) * plan.spans[number].size
                decode_groups(codes, scales, plan, number, group, 1, buffer, row)

            side_by_side(work, groups)
            start = span.start + first * span.size
            rows = slice(start, start + len(groups) * span.size)
            part = buffer[: len(groups) * span.size]
            yield rows, (part if output is None else part * output[rows, None]).to(dtype)
