"""An operator that no compiled kernel knows, as a plug-in brings one: importing this module registers it."""

from __future__ import annotations

from torch import Tensor

from usllm.sketch.operators import OPERATORS


class Extremes:
    """A state is its bucket's member of largest magnitude, a query takes the smallest candidate."""

    keeps_member: bool = False
    pad: int | float = 0.0

    def encode(self, weights: Tensor) -> Tensor:
        return weights

    def reduce(self, slots: Tensor, load: Tensor) -> Tensor:
        return slots.gather(1, slots.abs().argmax(1, keepdim=True)).squeeze(1)

    def decode(self, states: Tensor) -> Tensor:
        return states

    def encode_codes(self, codes: Tensor, query: str) -> Tensor:
        return codes

    def combine(self, candidates: Tensor) -> Tensor:
        return candidates.amin(0)

    def decode_codes(self, joined: Tensor, query: str) -> Tensor:
        return joined

    def divisor(self, rows: int) -> int:
        return 1


OPERATORS.setdefault("extremes", Extremes())
