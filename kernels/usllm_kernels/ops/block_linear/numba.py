"""Products of a few tokens with blocks on the CPU, in compiled loops; of more by the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm_kernels.cpu.blocks import multiply_blocks, multiply_blocks_part
from usllm_kernels.cpu.parallel import side_by_side
from usllm_kernels.cpu.team import team_of_torch
from usllm_kernels.ops.block_linear import reference

FEW_TOKENS = 6
"""Beyond, decoding once and torch's product are faster."""
_HALVES = (torch.bfloat16, torch.float16)
"""Types that are computed with here; in wider ones the bits are those of a product with the decoded weight."""
_LEAST_ON_TEAM = 1 << 16
"""Weights; below, torch's other threads save less than it takes to ask them."""
_LEAST_SHARED = 1 << 20
"""The same for threads that have to be woken, where torch's are not at hand."""


def supports(packed: Tensor) -> None:
    """All blocks."""


def block_linear(x: Tensor, packed: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """``x Ŵᵀ + b``, [tokens, rows]: fp32 for a few tokens in 16 bits, the same bits for every number of threads."""
    rows, tokens = packed.shape[0], x.shape[0]
    if not 0 < tokens <= FEW_TOKENS or x.dtype not in _HALVES or not packed.is_contiguous():
        return reference.block_linear(x, packed, bits, bias)
    values, found = x.float().contiguous(), torch.empty(tokens, rows)
    weights, team = rows * x.shape[1], team_of_torch()
    if team is not None:
        shape = tokens, x.shape[1], rows, packed.shape[1], bits
        threads = torch.get_num_threads() if weights >= _LEAST_ON_TEAM else 1
        team.run(multiply_blocks_part, (*shape, values.data_ptr(), packed.data_ptr(), found.data_ptr()), threads)
    else:
        inputs, codes, into = values.numpy(), packed.numpy(), found.numpy()
        parts = torch.get_num_threads() if weights >= _LEAST_SHARED else 1

        def part(number: int) -> None:
            multiply_blocks(inputs, codes, bits, into, rows * number // parts, rows * (number + 1) // parts)

        side_by_side(part, range(parts))
    return found if bias is None else found.add_(bias)
