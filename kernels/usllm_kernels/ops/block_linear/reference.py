"""The truth about products with blocks: decode some rows, then multiply, in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from usllm_kernels.blocks import chunk_rows, unpack_blocks


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
    step = chunk_rows(x.shape[1])
    if len(packed) <= step:
        return functional.linear(x, unpack_blocks(packed, bits, x.dtype), bias)
    y = x.new_empty(len(x), len(packed))
    for first in range(0, len(packed), step):
        chunk = slice(first, first + step)
        part = None if bias is None else bias[chunk]
        y[:, chunk] = functional.linear(x, unpack_blocks(packed[chunk], bits, x.dtype), part)
    return y
