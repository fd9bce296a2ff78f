"""Words of signs on the CPU, in a compiled loop."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm_kernels.cpu.parallel import side_by_side
from usllm_kernels.cpu.planes import join_bits
from usllm_kernels.planes import COLUMNS, OUTPUTS


def supports(bits: Tensor) -> None:
    """All bits."""


def plane_words(bits: Tensor) -> Tensor:
    """Words, int32 [out / 64, columns / 32, 64], of 0 and 1, uint8 [out, columns]."""
    outputs, columns = bits.shape
    words = torch.empty(outputs // OUTPUTS, columns // COLUMNS, OUTPUTS, dtype=torch.int32)
    given, into = bits.contiguous().numpy(), words.numpy()
    side_by_side(lambda block: join_bits(given, into, block), range(outputs // OUTPUTS))
    return words
