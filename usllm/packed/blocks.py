"""Weights at 8 or 4 bits in the blocks of GGUF: what the sketch leaves alone, when it is not kept at 16 bits.

Codes and scales are chosen by the ``gguf`` package; reading them (:mod:`usllm_kernels.blocks`) takes torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usllm_kernels.blocks import BLOCK, BLOCK_BYTES, SCALE_BYTES, SCHEMES, blocks_of, chunk_rows, unpack_blocks

__all__ = ["BLOCK", "SCHEMES", "bytes_per_row", "check_blocks", "chunk_rows", "fits", "pack_blocks", "unpack_blocks"]

CHUNK_BYTES = 16 << 20
"""Bound of the fp32 copies that packing makes at a time."""

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
    step = chunk_rows(columns, CHUNK_BYTES)
    for first in range(0, rows, step):
        chunk = weight[first : first + step].detach().to(device="cpu", dtype=torch.float32)
        if not bool(chunk.isfinite().all()):
            raise ValueError(f"{name}: holds values that are not finite")
        with np.errstate(all="ignore"):  # blocks of denormal numbers: their scale is 0, and so are they
            codes = quantize(chunk.contiguous().numpy(), scheme)
        packed[first : first + step] = torch.from_numpy(codes)
    check_blocks(packed, bits, name)
    return packed


def check_blocks(packed: Tensor, bits: int, name: str) -> None:
    """Check packed weights that came from a file; reads one byte of each block.

    Args:
        packed: uint8 [..., bytes per row], any device.
        bits: 8 or 4.
        name: Of the tensor, for the message.

    Raises:
        ValueError: A scale is not finite, or the bytes are no whole number of blocks; ``name`` is named.
    """
    blocks = blocks_of(packed, bits, name)
    broken = int(((blocks[..., SCALE_BYTES - 1] & _EXPONENT) == _EXPONENT).sum())
    if broken:
        raise ValueError(f"{name}: {broken} of {blocks[..., 0].numel()} block scales are not finite")
