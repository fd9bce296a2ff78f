"""Count-min, the paper's ablation: a state is the sum of its bucket's members, a query takes the smallest candidate.

On signed weights "smallest" is by magnitude, the counterpart of count-min's bound on non-negative counts.
"""

from __future__ import annotations

from torch import Tensor

from usllm.sketch.operators.base import first_taken, in_order


class CountMin:
    """Signed sum in, minimum magnitude out; of two equal magnitudes a query takes the first row's."""

    keeps_member: bool = False
    pad: int | float = 0.0

    def encode(self, weights: Tensor) -> Tensor:
        return weights

    def reduce(self, slots: Tensor, load: Tensor) -> Tensor:
        return in_order(slots)

    def decode(self, states: Tensor) -> Tensor:
        return states

    def encode_codes(self, codes: Tensor, query: str) -> Tensor:
        return codes

    def combine(self, candidates: Tensor) -> Tensor:
        best = candidates[0]
        for other in candidates[1:]:
            best = other.where(other.abs() < best.abs(), best)
        return best

    def decode_codes(self, joined: Tensor, query: str) -> Tensor:
        return joined

    def divisor(self, rows: int) -> int:
        return 1

    def derivative(self, candidates: Tensor) -> Tensor:
        return first_taken(candidates, self.combine(candidates))


OPERATOR = CountMin()
