"""The truth about products with blocks: decode some rows, then multiply, in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from usllm_kernels.blocks import unpack_blocks

DECODED_BYTES = 8 << 20
"""Bound of the fp32 weights that are decoded at a time; with their codes and their cast it is twice that."""


def supports(packed: Tensor) -> None:
    """All blocks."""


def block_linear(x: Tensor, packed: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """``x Ŵᵀ + b``, [tokens, rows], in the type of ``x``.

    Args:
        x: [tokens, columns].
        packed: uint8 [rows, bytes of a row].
        bits: 8 or 4.
        bias: [rows], in the type of ``x``.
    """
    step = max(1, DECODED_BYTES // (4 * x.shape[1]))
    if len(packed) <= step:
        return functional.linear(x, unpack_blocks(packed, bits, x.dtype), bias)
    y = x.new_empty(len(x), len(packed))
    for first in range(0, len(packed), step):
        chunk = slice(first, first + step)
        part = None if bias is None else bias[chunk]
        y[:, chunk] = functional.linear(x, unpack_blocks(packed[chunk], bits, x.dtype), part)
    return y
