"""Count-min, the paper's ablation: a state is the sum of its bucket's members, a query takes the smallest candidate.

On signed weights "smallest" is by magnitude, the counterpart of count-min's bound on non-negative counts.
"""

from __future__ import annotations

from torch import Tensor


class CountMin:
    """Signed sum in, minimum magnitude out."""

    linear = False
    pad = 0.0

    def encode(self, block: Tensor) -> Tensor:
        return block

    def reduce(self, slots: Tensor, load: Tensor) -> Tensor:
        return slots.sum(1)

    def decode(self, states: Tensor) -> Tensor:
        return states

    def combine(self, candidates: Tensor, query: str) -> Tensor:
        best = candidates[0]
        for other in candidates[1:]:
            best = other.where(other.abs() < best.abs(), best)
        return best

    def divisor(self, rows: int) -> int:
        return 1
