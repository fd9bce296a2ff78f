"""Weights at 8 or 4 bits in the blocks of GGUF, and how they are read.

A row is cut into blocks of 32 weights; a block stores an fp16 scale ``d`` (little-endian) and 32 signed codes ``q``;
a weight is ``d * q``. ``Q8_0`` keeps one code a byte (34 bytes a block, 8.5 bits per weight). ``Q4_0`` keeps two codes
a byte, each plus eight (18 bytes, 4.5 bits per weight): the low halves are weights 0 to 15, the high ones 16 to 31.

Source: ``gguf/quants.py`` and ``ggml-common.h`` of llama.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMES = {8: "Q8_0", 4: "Q4_0"}
"""GGUF's name of each number of bits."""
BLOCK = 32
"""Weights in a block."""
BLOCK_BYTES = {8: 34, 4: 18}
"""Bytes of a block."""
SCALE_BYTES = 2
"""Of a block, its first ones."""

DECODED_BYTES = 8 << 20
"""Bound of the fp32 weights that a product decodes at a time; with their codes and their cast it is twice that."""
_LOW_HALVES = 0x0F0F0F0F0F0F0F0F


def chunk_rows(columns: int, chunk_bytes: int = DECODED_BYTES) -> int:
    """Rows of ``columns`` weights whose fp32 form takes at most ``chunk_bytes``; at least one."""
    return max(1, chunk_bytes // (4 * columns))


def unpack_blocks(packed: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights of packed rows, the same bits on every device: ``d * q`` is exact in fp32, then rounded to ``dtype``.

    Args:
        packed: uint8 [..., bytes per row], any device.
        bits: 8 or 4.
        dtype: Of the result.

    Returns:
        [..., columns].

    Raises:
        ValueError: The bytes are no whole number of blocks.
    """
    blocks = blocks_of(packed, bits, "weight")
    # A copy, because the two bytes of a scale need not lie on an even address.
    scale = blocks[..., :SCALE_BYTES].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    codes = blocks[..., SCALE_BYTES:]
    if bits == 8:
        codes = codes.view(torch.int8)
    else:
        words = codes.clone(memory_format=torch.contiguous_format).view(torch.int64)  # eight bytes at a time
        codes = torch.cat((words & _LOW_HALVES, words >> 4 & _LOW_HALVES), -1).view(torch.int8).sub_(8)
    weight = codes.to(torch.float32, memory_format=torch.contiguous_format)
    return weight.mul_(scale).flatten(-2).to(dtype)


def blocks_of(packed: Tensor, bits: int, name: str) -> Tensor:
    """Packed rows as uint8 [..., blocks, bytes per block].

    Raises:
        ValueError: The bytes are no whole number of blocks; ``name`` is named.
    """
    if bits not in SCHEMES:
        raise ValueError(f"{name}: {bits} bits: unknown; choose one of {', '.join(map(str, SCHEMES))}")
    size = BLOCK_BYTES[bits]
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] % size:
        shape = tuple(packed.shape)
        raise ValueError(
            f"{name}: rows must be whole {SCHEMES[bits]} blocks of {size} bytes, is {packed.dtype} {shape}"
        )
    return packed.unflatten(-1, (packed.shape[-1] // size, size))
