"""What the sketch's decode is measured against: itself as written down, and the published form of products."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch import Plan, States, channel_scales
from usllm_kernels import matrix_query

__all__ = ["matrix_query", "naive_query"]


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
                turn = plan.rotation(span) + plan.turns * (group * plan.shape[1] + channels)
                q = (torch.arange(span.size, device=device)[:, None] - turn) % span.size
                best = torch.zeros(q.shape, dtype=torch.int16, device=device)
                for row in range(block.choice.rows):
                    candidate = codes[first + row * k + buckets[row][q]].to(torch.int16)
                    best = torch.where(candidate.abs() > best.abs(), candidate, best)
                rows = slice(span.start + group * span.size, span.start + (group + 1) * span.size)
                decoded[rows, channels] = (best * scales[channels]).to(dtype)
                first = first + block.choice.rows * k
    return decoded
