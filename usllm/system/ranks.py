"""The processes of a distributed run, for code that shares work out among them. Needs torch alone.

Without ``torch.distributed`` there is one rank, and nothing here communicates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from itertools import islice
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from usllm.system.errors import RunError

T = TypeVar("T")


class Ranks(NamedTuple):
    """This process's number and how many there are."""

    rank: int = 0
    world_size: int = 1


_alone = ContextVar("alone", default=False)


def ranks() -> Ranks:
    """Where this process stands among those that run together."""
    if _alone.get() or not dist.is_available() or not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """For what one rank does while the others wait for it: inside there is one rank, and nothing communicates."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def dealt(items: Iterable[T]) -> Iterator[tuple[int, T, bool]]:
    """Deal ``items`` out to the ranks in turn: ``(number, item, counts)`` of those that this rank gets.

    All ranks get equally many, because with sharded weights each forward pass needs all of them: where the last round
    has too few, those left over get its first item once more, to be computed and not counted (``counts`` is false).
    """
    rank, world_size = ranks()
    source = iter(items)
    first = 0
    while turn := list(islice(source, world_size)):
        mine = rank if rank < len(turn) else 0
        yield first + mine, turn[mine], mine == rank
        first += len(turn)


def sum_over_ranks_(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all ranks, in place; the result is the same on each of them, bit for bit."""
    if ranks().world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def shared_from_rank_zero(value: T) -> T:
    """What rank 0 passes in, on all ranks; values of other ranks are dropped."""
    if ranks().world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: T) -> list[T]:
    """What each rank passes in, on all of them, in the order of the ranks."""
    if ranks().world_size == 1:
        return [value]
    found: list[T] = [value] * ranks().world_size
    dist.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """For a block in which one rank may fail while the others would wait for it: all of them raise, or none.

    All ranks enter it, and what can fail in it comes after everything in it that needs the other ranks.

    Raises:
        RunError: on the ranks where the block itself went well; names a rank where it did not, and that rank's error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    world_size = ranks().world_size
    failures: list[str | None] = [None] * world_size
    if world_size > 1:
        dist.all_gather_object(failures, None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    for rank, message in enumerate(failures):
        if message is not None:
            raise RunError(f"rank {rank} has failed: {message}")
