"""Weights at 8 or 4 bits in the blocks of GGUF: what the sketch leaves alone, when it is not kept at 16 bits.

A row is cut into blocks of 32 weights; a block stores an fp16 scale ``d`` (little-endian) and 32 signed codes ``q``;
a weight is ``d * q``. ``Q8_0`` keeps one code a byte (34 bytes a block, 8.5 bits per weight). ``Q4_0`` keeps two codes
a byte, each plus eight (18 bytes, 4.5 bits per weight): the low halves are weights 0 to 15, the high ones 16 to 31.
Codes and scales are chosen by the ``gguf`` package; reading them takes torch alone.

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
CHUNK_BYTES = 16 << 20
"""Bound of the fp32 copies that packing makes at a time."""

_SCALE_BYTES = 2
_LOW_HALVES = 0x0F0F0F0F0F0F0F0F
_EXPONENT = 0x7C  # of an fp16 number, in its second byte; all ones for infinities and NaN


def fits(columns: int) -> bool:
    """Whether rows of this length can be cut into blocks; other tensors stay at 16 bits."""
    return columns > 0 and columns % BLOCK == 0


def bytes_per_row(columns: int, bits: int, name: str = "weight") -> int:
    """Bytes that a row of ``columns`` weights takes.

    Raises:
        ValueError: There is no such scheme, or the row cannot be cut into blocks; ``name`` is named.
    """
    if bits not in SCHEMES:
        raise ValueError(f"{name}: {bits} bits: unknown; choose one of {', '.join(map(str, SCHEMES))}")
    if not fits(columns):
        raise ValueError(f"{name}: {columns} columns are not a multiple of {BLOCK}, the size of a block")
    return columns // BLOCK * BLOCK_BYTES[bits]


def chunk_rows(columns: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows of ``columns`` weights whose fp32 form takes at most ``chunk_bytes``; at least one."""
    return max(1, chunk_bytes // (4 * columns))


def pack_blocks(weight: Tensor, bits: int, name: str = "weight") -> Tensor:
    """Quantise a weight, some rows at a time.

    Args:
        weight: [rows, columns], any float dtype and device.
        bits: 8 or 4.
        name: Of the tensor, for messages.

    Returns:
        uint8 [rows, bytes per row], on the CPU; always the same for the same weight.

    Raises:
        ValueError: The weight does not fit into blocks, or holds values that are not finite or too large for an fp16
            scale; ``name`` is named.
    """
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"{name}: must be a matrix of floats, is {weight.dtype} {tuple(weight.shape)}")
    rows, columns = weight.shape
    packed = torch.empty(rows, bytes_per_row(columns, bits, name), dtype=torch.uint8)
    scheme = GGMLQuantizationType[SCHEMES[bits]]
    step = chunk_rows(columns)
    for first in range(0, rows, step):
        chunk = weight[first : first + step].detach().to(device="cpu", dtype=torch.float32)
        if not bool(chunk.isfinite().all()):
            raise ValueError(f"{name}: holds values that are not finite")
        with np.errstate(all="ignore"):  # blocks of denormal numbers: their scale is 0, and so are they
            codes = quantize(chunk.contiguous().numpy(), scheme)
        packed[first : first + step] = torch.from_numpy(codes)
    check_blocks(packed, bits, name)
    return packed


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
    blocks = _blocks(packed, bits, "weight")
    # A copy, because the two bytes of a scale need not lie on an even address.
    scale = blocks[..., :_SCALE_BYTES].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    codes = blocks[..., _SCALE_BYTES:]
    if bits == 8:
        codes = codes.view(torch.int8)
    else:
        words = codes.clone(memory_format=torch.contiguous_format).view(torch.int64)  # eight bytes at a time
        codes = torch.cat((words & _LOW_HALVES, words >> 4 & _LOW_HALVES), -1).view(torch.int8).sub_(8)
    weight = codes.to(torch.float32, memory_format=torch.contiguous_format)
    return weight.mul_(scale).flatten(-2).to(dtype)


def check_blocks(packed: Tensor, bits: int, name: str) -> None:
    """Check packed weights that came from a file; reads one byte of each block.

    Args:
        packed: uint8 [..., bytes per row], any device.
        bits: 8 or 4.
        name: Of the tensor, for the message.

    Raises:
        ValueError: A scale is not finite, or the bytes are no whole number of blocks; ``name`` is named.
    """
    blocks = _blocks(packed, bits, name)
    broken = int(((blocks[..., _SCALE_BYTES - 1] & _EXPONENT) == _EXPONENT).sum())
    if broken:
        raise ValueError(f"{name}: {broken} of {blocks[..., 0].numel()} block scales are not finite")


def _blocks(packed: Tensor, bits: int, name: str) -> Tensor:
    """``packed`` as uint8 [..., blocks, bytes per block]."""
    if bits not in SCHEMES:
        raise ValueError(f"{name}: {bits} bits: unknown; choose one of {', '.join(map(str, SCHEMES))}")
    size = BLOCK_BYTES[bits]
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] % size:
        shape = tuple(packed.shape)
        raise ValueError(
            f"{name}: rows must be whole {SCHEMES[bits]} blocks of {size} bytes, is {packed.dtype} {shape}"
        )
    return packed.unflatten(-1, (packed.shape[-1] // size, size))
