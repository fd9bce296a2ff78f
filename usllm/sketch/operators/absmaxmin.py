"""AbsMaxMin: a state is its bucket's member of smallest magnitude; a query takes the largest candidate.

Every candidate is at most as large as the weight, so the decode never overestimates a magnitude (the underestimate
property, UltraSketchLLM §3).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MIN = -(2**31)


class AbsMaxMin:
    """Signed minimum magnitude in, maximum magnitude out."""

    linear = False
    pad = 2**31 - 1

    def encode(self, block: Tensor) -> Tensor:
        """int32 keys that order by magnitude and carry the sign in the lowest bit, so that one integer minimum
        finds the member; of two equal magnitudes the positive one wins."""
        bits = block.view(torch.int32)
        negative = bits >> 31  # 0 or -1
        return bits.bitwise_left_shift_(1).sub_(negative).add_(_MIN)

    def reduce(self, slots: Tensor, load: Tensor) -> Tensor:
        return slots.amin(1)

    def decode(self, states: Tensor) -> Tensor:
        key = states - _MIN
        magnitude = (key >> 1).bitwise_and_(0x7FFFFFFF)
        return magnitude.bitwise_or_(key << 31).view(torch.float32).masked_fill_(states == self.pad, 0.0)

    def combine(self, candidates: Tensor, query: str) -> Tensor:
        if candidates.shape[0] == 1:
            return candidates[0]
        high = candidates.amax(0)
        if query == "signed_max":
            return high
        low = candidates.amin(0)
        return torch.where(high >= -low, high, low)

    def divisor(self, rows: int) -> int:
        return 1
