"""The order of training: a function of the seed and the position, and of nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class UnrolledSampler(Sampler[int]):
    """All passes over the data in one: a whole run is one Lightning epoch.

    Resuming is exact only away from an epoch's end (Lightning counts the epoch once more there), so there is one end,
    that of the run. Each pass is a new permutation, drawn from (seed, pass); the ranks of a distributed run take
    turns in one common order, so that the samples of a step do not depend on how many ranks share it.

    Args:
        size: number of sequences in the data set.
        total: number of samples that this rank draws in the whole run.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        start: number of samples that this rank has drawn before, in an earlier part of the run. The length stays that
            of the whole run, which Lightning counts through.
    """

    def __init__(self, size: int, total: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0) -> None:
        if size < 1 or total < 1 or not 0 <= rank < world_size:
            raise ValueError(f"size={size} and total={total} must be positive, rank={rank} below {world_size}")
        self.size = size
        self.total = total
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        current, order = -1, torch.empty(0, dtype=torch.long)
        for drawn in range(self.start, self.total):
            turn, position = divmod(drawn * self.world_size + self.rank, self.size)
            if turn != current:
                current, order = turn, self._permutation(turn)
            yield int(order[position])

    def _permutation(self, turn: int) -> torch.Tensor:
        # Not seed + turn: then seed 1 would begin with the second pass of seed 0.
        digest = hashlib.sha256(f"usllm order {self.seed} {turn}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.randperm(self.size, generator=generator)


FILLER = -1


class DealtSampler(Sampler[int]):
    """Each sequence once, in order, dealt out to the ranks in turn.

    All ranks draw equally many, because with sharded weights each forward pass needs all of them: ``FILLER`` stands for
    the sequences that the last turn lacks.

    Args:
        size: number of sequences in the data set.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, size: int, rank: int = 0, world_size: int = 1) -> None:
        self.size = size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        for turn in range(0, self.size, self.world_size):
            position = turn + self.rank
            yield position if position < self.size else FILLER
