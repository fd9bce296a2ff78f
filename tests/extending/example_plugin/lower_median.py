"""An operator: the lower median of a bucket's members; over several rows the mean of the candidates."""

import torch
from torch import Tensor

from usllm.sketch.operators import OPERATORS


class LowerMedian:
    """The lower median in, the mean of the rows out."""

    keeps_member: bool = False  # the member that a state is, is not the one of least encoded value
    pad: int | float = float("inf")  # sorted behind all members

    def encode(self, weights: Tensor) -> Tensor:
        return weights

    def reduce(self, slots: Tensor, load: Tensor) -> Tensor:
        middle = (load.long() - 1).clamp_min(0) // 2  # [rows, states, 1]
        place = middle[:, None].expand(-1, 1, -1, slots.shape[-1])
        return slots.sort(1).values.gather(1, place)[:, 0]

    def decode(self, states: Tensor) -> Tensor:
        return torch.where(states.isinf(), 0.0, states)  # a bucket without a member holds the pad

    def encode_codes(self, codes: Tensor, query: str) -> Tensor:
        return codes

    def combine(self, candidates: Tensor) -> Tensor:
        return candidates.sum(0, dtype=torch.int32)

    def decode_codes(self, joined: Tensor, query: str) -> Tensor:
        return joined

    def divisor(self, rows: int) -> int:
        return rows

    def derivative(self, candidates: Tensor) -> Tensor:  # only sketch.straight_through=state asks for it
        return torch.ones_like(candidates, dtype=torch.bool)


OPERATORS["lower_median"] = LowerMedian()
