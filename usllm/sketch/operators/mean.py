"""Bucket mean, as in HashedNets: the least-squares state of its bucket; rows are averaged. Linear in the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch.operators.base import in_order


class Mean:
    """Mean of the members in, mean of the rows out."""

    keeps_member: bool = False
    pad: int | float = 0.0

    def encode(self, weights: Tensor) -> Tensor:
        return weights

    def reduce(self, slots: Tensor, load: Tensor) -> Tensor:
        return in_order(slots) / load.clamp_min(1)

    def decode(self, states: Tensor) -> Tensor:
        return states

    def encode_codes(self, codes: Tensor, query: str) -> Tensor:
        return codes

    def combine(self, candidates: Tensor) -> Tensor:
        return candidates.sum(0, dtype=torch.int32)

    def decode_codes(self, joined: Tensor, query: str) -> Tensor:
        return joined

    def divisor(self, rows: int) -> int:
        return rows

    def derivative(self, candidates: Tensor) -> Tensor:
        return torch.ones_like(candidates, dtype=torch.bool)


OPERATOR = Mean()
