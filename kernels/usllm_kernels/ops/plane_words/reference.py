"""The truth about words of signs: bits put together in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch.bitstream import pack
from usllm_kernels.planes import COLUMNS, OUTPUTS


def supports(bits: Tensor) -> None:
    """All bits."""


def plane_words(bits: Tensor) -> Tensor:
    """Words, int32 [out / 64, columns / 32, 64], of 0 and 1, uint8 [out, columns]."""
    by_block = bits.view(-1, OUTPUTS, bits.shape[1] // COLUMNS, COLUMNS).transpose(1, 2).contiguous()
    return pack([(by_block, 1)], bits.device).view(torch.int32).view(by_block.shape[:-1])
