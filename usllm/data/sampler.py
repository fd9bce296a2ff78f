"""The order of training: a function of the seed and the position, and of nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class UnrolledSampler(Sampler[int]):
    """All passes over the data in one: a whole run is one Lightning epoch.

    Several texts that lie one after another take turns by their shares of the sequences, as evenly as whole numbers
    allow; each has passes of its own.

    Resuming is exact only away from an epoch's end (Lightning counts the epoch once more there), so there is one end,
    that of the run. Each pass is a new permutation, drawn from (seed, pass); the ranks of a distributed run take
    turns in one common order, so that the samples of a step do not depend on how many ranks share it.

    Args:
        size: number of sequences in the data set; where it holds several texts, of each.
        total: number of samples that this rank draws in the whole run.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        start: number of samples that this rank has drawn before, in an earlier part of the run. The length stays that
            of the whole run, which Lightning counts through.
        shares: of the texts, which add up to 1.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        total: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        shares: Sequence[float] = (1.0,),
    ) -> None:
        sizes = (size,) if isinstance(size, int) else tuple(size)
        if min(sizes) < 1 or total < 0 or not 0 <= rank < world_size or len(sizes) != len(shares):
            raise ValueError(f"size={size} must be positive, total={total} not below 0, rank={rank} below {world_size}")
        self.sizes, self.shares = sizes, tuple(shares)
        self.total = total
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self._orders: dict[int, tuple[int, torch.Tensor]] = {}  # of each text: the pass, and its order

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        for drawn in range(self.start, self.total):
            part, taken = whose_turn(drawn * self.world_size + self.rank, self.shares)
            yield sum(self.sizes[:part]) + self.drawn(part, taken)

    def drawn(self, part: int, taken: int) -> int:
        """The sequence of a text that comes after ``taken`` others of it."""
        turn, position = divmod(taken, self.sizes[part])
        if part not in self._orders or self._orders[part][0] != turn:
            self._orders[part] = turn, self._permutation(part, turn)
        return int(self._orders[part][1][position])

    def _permutation(self, part: int, turn: int) -> torch.Tensor:
        # Not seed + turn: then seed 1 would begin with the second pass of seed 0.
        return permutation(self.sizes[part], f"usllm order {self.seed} {turn}" + (f" of text {part}" if part else ""))


def permutation(size: int, words: str) -> torch.Tensor:
    """A permutation ``[size]`` that depends on ``words`` alone."""
    seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little", signed=True)
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def whose_turn(place: int, shares: Sequence[float]) -> tuple[int, int]:
    """Which text a place in the order of training belongs to, and how many of that text's places lie before it.

    The last text takes its share of all places, as evenly as whole numbers allow; the last but one of what is left,
    and so on.

    Args:
        place: counted from 0.
        shares: of the texts, which add up to 1.
    """
    left = 1.0
    for part in range(len(shares) - 1, 0, -1):
        share = min(shares[part] / left, 1.0)
        before, after = int(place * share), int((place + 1) * share)
        if after > before:
            return part, before
        place, left = place - before, left - shares[part]
    return 0, place


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
