"""Products with blocks on the CPU: of a few tokens from the codes, of more with weights decoded some rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from usllm_kernels.cpu.blocks import decode_blocks_part, multiply_blocks_part
from usllm_kernels.cpu.parallel import workers
from usllm_kernels.ops.block_linear import reference

FEW_TOKENS = 6
"""Beyond, decoding once and torch's product are faster."""
_DECODED = 1 << 19
"""Weights that are decoded at a time, while they stay in the second cache."""
_HALVES = (torch.bfloat16, torch.float16)
"""Types of few tokens that are multiplied here; wider ones have the bits of a product with the decoded weight."""
_LEAST_SHARED = 1 << 16
"""Weights; below, other threads save less than it takes to ask them."""


def supports(packed: Tensor) -> None:
    """All blocks."""


def block_linear(x: Tensor, packed: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """``x Ŵᵀ + b``, [tokens, rows]; of a few tokens in 16 bits fp32, of the same bits for every number of threads."""
    rows, tokens = packed.shape[0], x.shape[0]
    plain = tokens > 0 and packed.is_contiguous()
    if plain and tokens > FEW_TOKENS and x.dtype == torch.bfloat16:
        return _by_weights(x, packed, bits, bias)
    if not plain or tokens > FEW_TOKENS or x.dtype not in _HALVES:
        return reference.block_linear(x, packed, bits, bias)
    values, by = x.float().contiguous(), workers()
    found = values.new_empty(tokens, rows)
    shape = tokens, x.shape[1], rows, packed.shape[1], bits
    numbers = *shape, values.data_ptr(), packed.data_ptr(), found.data_ptr()
    by.run(multiply_blocks_part, numbers, by.threads(rows * x.shape[1], _LEAST_SHARED))
    return found if bias is None else found.add_(bias)


def _by_weights(x: Tensor, packed: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """Torch's product in bfloat16, with some rows' weights at a time."""
    rows, columns = packed.shape[0], x.shape[1]
    step, by = max(_DECODED // max(columns, 1), 1), workers()
    found = x.new_empty(len(x), rows)
    for first in range(0, rows, step):
        part = packed[first : first + step]
        weight = x.new_empty(len(part), columns)
        shape = columns, len(part), packed.shape[1], bits
        threads = by.threads(weight.numel(), _LEAST_SHARED)
        by.run(decode_blocks_part, (*shape, part.data_ptr(), weight.data_ptr()), threads)
        of_part = None if bias is None else bias[first : first + step]
        found[:, first : first + step] = functional.linear(x, weight, of_part)
    return found
