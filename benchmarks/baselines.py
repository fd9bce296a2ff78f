"""What the sketch's decode is measured against: itself as written down, and the published form of products."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch import Plan, States, channel_scales
from usllm.sketch.rotation import unrotate_
from usllm_kernels.plan_cache import cached_by_plan


def naive_query(states: States, plan: Plan, dtype: torch.dtype) -> Tensor:
    """AbsMaxMin decoded as written down: hash every weight, gather every row's candidate, take the largest."""
    codes, device = states["codes"], states["codes"].device
    decoded = torch.zeros(plan.shape, dtype=dtype, device=device)
    scales = channel_scales(states, plan)
    for block in plan.blocks:
        channels = block.channels.to(device)
        first = block.first_state + torch.arange(len(channels), device=device) * block.states_per_channel
        for span in plan.spans:
            buckets = plan.placement(block.choice, span.size).buckets.long().to(device)
            k = min(block.choice.states, span.size)
            for group in range(span.groups):
                turn = plan.rotation(span) + plan.rotation_step * (group * plan.shape[1] + channels)
                q = (torch.arange(span.size, device=device)[:, None] - turn) % span.size
                best = torch.zeros(q.shape, dtype=torch.int16, device=device)
                for row in range(block.choice.rows):
                    candidate = codes[first + row * k + buckets[row][q]].to(torch.int16)
                    best = torch.where(candidate.abs() > best.abs(), candidate, best)
                rows = slice(span.start + group * span.size, span.start + (group + 1) * span.size)
                decoded[rows, channels] = (best * scales[channels]).to(dtype)
                first = first + block.choice.rows * k
    return decoded


def matrix_query(states: States, plan: Plan, dtype: torch.dtype = torch.float32) -> Tensor:
    """The published form: products with a 0/1 matrix, made once a plan. Decoded weight [out, in] without output scales.

    ``P_r [n, K]`` holds a one where position q falls into bucket k; candidates are ``P_r S_r``. Every weight costs 2 K
    operations a row, and the candidates of all rows are written before they are joined.

    Args:
        states: Of the plan, unpacked.
        plan: The layer's plan.
        dtype: Of the products, float32 or bfloat16; codes of 8 bits are exact in both.
    """
    codes, operator, width = states["codes"], plan.operator, plan.shape[1]
    decoded = torch.zeros(plan.shape, device=codes.device)
    for span_index, span in enumerate(plan.spans):
        rotated = torch.zeros(span.groups * width, span.size, device=codes.device)
        for class_index, block in enumerate(plan.blocks):
            choice = block.choice
            held = codes[block.first_state : block.first_state + block.num_states].view(len(block.channels), -1)
            sizes = [s.groups * choice.rows * min(choice.states, s.size) for s in plan.spans]
            part = (
                held.split(sizes, 1)[span_index].to(dtype).reshape(len(block.channels) * span.groups, choice.rows, -1)
            )
            ones = _ones(plan, span_index, class_index, codes.device, dtype)  # [rows, n, K]
            candidates = torch.matmul(ones, part.permute(1, 2, 0)).to(codes.dtype)  # [rows, n, channels * groups]
            joined = operator.combine(operator.encode_codes(candidates, plan.config.query))
            row = torch.arange(0, span.groups * width, width)
            at = (block.channels[:, None] + row).flatten().to(codes.device)
            rotated[at] = operator.decode_codes(joined, plan.config.query).t().float()
        unrotate_(rotated, decoded, span, plan.rotation(span), plan.rotation_step)
    return decoded.mul_(channel_scales(states, plan)).to(dtype)


@cached_by_plan
def _ones(plan: Plan, span_index: int, class_index: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    choice, n = plan.blocks[class_index].choice, plan.spans[span_index].size
    buckets = plan.placement(choice, n).buckets.long()
    return torch.nn.functional.one_hot(buckets, min(choice.states, n)).to(device, dtype)
