"""The truth about words of bit planes: bits put together in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch.bitstream import pack
from usllm_kernels.planes import COLUMNS, OUTPUTS


def supports(numbers: Tensor) -> None:
    """All numbers."""


def plane_words(numbers: Tensor, bits: int) -> Tensor:
    """Words, int32 [bits, out / 64, columns / 32, 64], of numbers below ``2^bits``, uint8 [out, columns]."""
    by_block = numbers.view(-1, OUTPUTS, numbers.shape[1] // COLUMNS, COLUMNS).transpose(1, 2).contiguous()
    planes = [pack([((by_block >> plane) & 1, 1)], numbers.device) for plane in range(bits)]
    return torch.stack(planes).view(torch.int32).view(bits, *by_block.shape[:-1])
