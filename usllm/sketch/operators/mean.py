"""Bucket mean, as in HashedNets: the least-squares state of its bucket; rows are averaged. Linear in the weights."""

from __future__ import annotations

import torch
from torch import Tensor


class Mean:
    """Mean of the members in, mean of the rows out."""

    linear = True
    pad = 0.0

    def encode(self, block: Tensor) -> Tensor:
        return block

    def reduce(self, slots: Tensor, load: Tensor) -> Tensor:
        return slots.sum(1) / load.clamp_min(1)

    def decode(self, states: Tensor) -> Tensor:
        return states

    def combine(self, candidates: Tensor, query: str) -> Tensor:
        return candidates[0] if candidates.shape[0] == 1 else candidates.sum(0, dtype=torch.int32)

    def divisor(self, rows: int) -> int:
        return rows
