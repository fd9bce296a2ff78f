"""Words of signs on CUDA: a program for each word of 64 outputs."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Annotations mean something else to Triton.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usllm_kernels.planes import COLUMNS, OUTPUTS


def supports(bits: Tensor) -> None:
    """All bits."""


@triton.jit
def plane_words_kernel(
    bits,  # uint8 [out, columns]
    words,  # int32 [out / OUTPUTS, columns / COLUMNS, OUTPUTS], written
    columns,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block, word = tl.program_id(0), tl.program_id(1)
    i, place = tl.arange(0, OUTPUTS), tl.arange(0, COLUMNS)
    row = (block * OUTPUTS + i).to(tl.int64)
    bit = tl.load(bits + row[:, None] * columns + word * COLUMNS + place[None, :]).to(tl.int32)
    joined = tl.sum(bit << place[None, :], 1)  # no two have a bit in common
    tl.store(words + (block * (columns // COLUMNS) + word).to(tl.int64) * OUTPUTS + i, joined)


def plane_words(bits: Tensor) -> Tensor:
    """Words, int32 [out / 64, columns / 32, 64], of 0 and 1, uint8 [out, columns]."""
    rows, columns = bits.shape
    words = torch.empty(rows // OUTPUTS, columns // COLUMNS, OUTPUTS, dtype=torch.int32, device=bits.device)
    if words.numel():
        plane_words_kernel[words.shape[0], words.shape[1]](
            bits.contiguous(), words, columns, OUTPUTS=OUTPUTS, COLUMNS=COLUMNS
        )
    return words
