"""The published form of the query: products with a 0/1 matrix, made once a plan. A baseline to measure against.

``P_r [n, K]`` holds a one where position q falls into bucket k; candidates are ``P_r S_r``. Every weight costs 2 K
operations a row, and the candidates of all rows are written before they are joined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch import Plan, channel_scales
from usllm.sketch.codec import States
from usllm.sketch.rotation import unrotate_
from usllm_kernels.plan_cache import cached_by_plan


def matrix_query(states: States, plan: Plan, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decoded weight [out, in] without output scales; products in ``dtype``, in which codes of 8 bits are exact.

    Args:
        states: Of the plan, unpacked.
        plan: The layer's plan.
        dtype: float32 or bfloat16.
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
