"""Products of a few tokens with blocks on the CPU, in compiled loops; of more by the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm_kernels.cpu.blocks import multiply_blocks
from usllm_kernels.cpu.parallel import side_by_side
from usllm_kernels.ops.block_linear import reference

FEW_TOKENS = 6
"""Beyond, decoding once and torch's product are faster."""
_HALVES = (torch.bfloat16, torch.float16)
"""Types that are computed with here; in wider ones the bits are those of a product with the decoded weight."""
_LEAST_SHARED = 1 << 20
"""Weights; below, starting a second thread takes longer than it saves."""


def supports(packed: Tensor) -> None:
    """All blocks."""


def block_linear(x: Tensor, packed: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """``x Ŵᵀ + b``, [tokens, rows]: fp32 for a few tokens in 16 bits, the same bits for every number of threads."""
    rows, tokens = packed.shape[0], x.shape[0]
    if not 0 < tokens <= FEW_TOKENS or x.dtype not in _HALVES or not packed.is_contiguous():
        return reference.block_linear(x, packed, bits, bias)
    values, codes = x.float().contiguous().numpy(), packed.numpy()
    found = torch.empty(tokens, rows)
    into, threads = found.numpy(), torch.get_num_threads() if rows * x.shape[1] >= _LEAST_SHARED else 1

    def work(part: int) -> None:
        multiply_blocks(values, codes, bits, into, rows * part // threads, rows * (part + 1) // threads)

    side_by_side(work, range(threads))
    return found if bias is None else found.add_(bias)
