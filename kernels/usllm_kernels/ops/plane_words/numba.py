"""Words of bit planes on the CPU, in a compiled loop."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm_kernels.cpu.parallel import side_by_side
from usllm_kernels.cpu.planes import join_bits
from usllm_kernels.planes import COLUMNS, OUTPUTS


def supports(numbers: Tensor) -> None:
    """All numbers."""


def plane_words(numbers: Tensor, bits: int) -> Tensor:
    """Words, int32 [bits, out / 64, columns / 32, 64], of numbers below ``2^bits``, uint8 [out, columns]."""
    outputs, columns = numbers.shape
    words = torch.empty(bits, outputs // OUTPUTS, columns // COLUMNS, OUTPUTS, dtype=torch.int32)
    given, into = numbers.contiguous().numpy(), words.numpy()
    side_by_side(lambda block: join_bits(given, into, block), range(outputs // OUTPUTS))
    return words
