"""Filling: how a rule's answer is brought close to its ceiling, and never above it.

A rule gives every channel one of a few classes and spends no more than the budget. What rounding left over is spent
here, and the table that this needs is paid for: channels go up to the next class; one channel gets a class of its own,
cut to fit; the channels of one class get more states, all as many. Where two percent are left over even then, a class
gives up a few states of each channel for one channel more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable
from usllm.sketch.classes import EMPTY, MAX_CLASSES, ChannelClass
from usllm.sketch.config import STATE_BITS

_SMALL_LAYER = 1 << 16  # weights


class _Answer(NamedTuple):
    """Classes by rising cost, all in use; the class of each channel, int64 [in]; the bits left over."""

    classes: tuple[ChannelClass, ...]
    level: Tensor
    left: int


def fill(problem: AllocationProblem, levels: Sequence[ChannelClass], level: Tensor, order: list[int], left: int) -> int:
    """Raise channels to the next level, one step a turn in the given order, while the bits last.

    Args:
        problem: The layer.
        levels: Classes by rising cost.
        level: int64 [in], index into ``levels`` per channel; changed in place.
        order: Channels, first served first.
        left: Bits left; with a negative number nothing is raised.

    Returns:
        Bits left over.
    """
    costs = [problem.channel_bits(choice) for choice in levels]
    steps = [above - below for below, above in pairwise(costs)]
    now = level.tolist()
    while steps and left >= min(steps):
        moved = False
        for channel in order:
            if now[channel] < len(steps) and steps[now[channel]] <= left:
                left -= steps[now[channel]]
                now[channel] += 1
                moved = True
        if not moved:
            break
    level.copy_(torch.tensor(now, dtype=level.dtype))
    return left


def table(
    problem: AllocationProblem, levels: Sequence[ChannelClass], level: Tensor, order: list[int], spare: ChannelClass
) -> AllocationTable:
    """The table of a rule's answer, with what is left over spent.

    Args:
        problem: The layer.
        levels: Classes by rising cost.
        level: int64 [in], index into ``levels`` per channel; with a table of the classes in use within the budget.
        order: Channels that may be raised, first served first.
        spare: Rows and width of a channel without states that is given a class of its own.
    """
    answer = _refilled(problem, levels, level, order)
    before = None
    while answer is not before and answer.left > problem.negligible_bits:
        before = answer
        answer = min([answer, *_with_own_class(problem, answer, order, spare)], key=lambda other: other.left)
    if answer.left > problem.negligible_bits:
        answer = min([answer, *_with_more_states(problem, answer)], key=lambda other: other.left)
    if answer.left > problem.wasted_bits:
        answer = min([answer, *_with_one_more_channel(problem, answer, order)], key=lambda other: other.left)
    return AllocationTable(answer.classes, answer.level.to(torch.uint8))


def _refilled(problem: AllocationProblem, levels: Sequence[ChannelClass], level: Tensor, order: list[int]) -> _Answer:
    """Classes that no channel is in are dropped, and the bits of their table go to the channels, until all are used."""
    while True:
        answer = _answer(problem, levels, level)
        levels, level = answer.classes, answer.level
        left = fill(problem, levels, level, order, answer.left)
        if left == answer.left:
            return answer


def _answer(problem: AllocationProblem, levels: Sequence[ChannelClass], level: Tensor) -> _Answer:
    """The classes in use, each once, and what they leave over."""
    used = {levels[i] for i in torch.unique(level).tolist()}
    classes = tuple(sorted(used, key=lambda choice: (problem.channel_bits(choice), choice)))
    place = torch.tensor([classes.index(choice) if choice in used else 0 for choice in levels])
    level = place[level]
    return _Answer(classes, level, problem.left_over(AllocationTable(classes, level)))


def _with_own_class(
    problem: AllocationProblem, answer: _Answer, order: list[int], spare: ChannelClass
) -> Iterator[_Answer]:
    """For the first channel of each class: the answer in which it has a class of its own, cut to fit."""
    count = len(answer.classes)
    left = problem.available(count + 1) - problem.available(count) + answer.left
    if count == MAX_CLASSES or left <= 0:
        return
    first: dict[int, int] = {}
    for channel in order:
        first.setdefault(int(answer.level[channel]), channel)
    for number, channel in first.items():
        most = problem.channel_bits(answer.classes[number]) + left
        level = answer.level.clone()
        level[channel] = count
        yield _answer(problem, (*answer.classes, _cut(problem, answer.classes[number], spare, most)), level)


def _cut(problem: AllocationProblem, now: ChannelClass, spare: ChannelClass, most: int) -> ChannelClass:
    """The class of at most ``most`` bits for a channel of class ``now``: of its own shape where that fits closely."""
    best = now
    for rows, bits in _shapes(problem, now, spare):
        found = problem.widest(ChannelClass(rows, 0, bits), most)
        if problem.channel_bits(found) > problem.channel_bits(best):
            best = found
        if best != now and most - problem.channel_bits(best) <= problem.negligible_bits:
            break
    return best


def _shapes(problem: AllocationProblem, now: ChannelClass, spare: ChannelClass) -> list[tuple[int, int]]:
    """Rows and widths that a channel of class ``now`` may be given, the rule's own first.

    In a small layer that is all. In a large one, steps that matter come from groups far smaller than the layer: there
    one channel may take fewer rows, then narrower states; not signs, which may exceed a weight.
    """
    own = spare if now == EMPTY else now
    if problem.shape[0] * problem.shape[1] <= _SMALL_LAYER:
        return [(own.rows, own.bits)]
    widths = [bits for bits in reversed(STATE_BITS) if min(own.bits, 2) <= bits <= own.bits]
    return [(rows, bits) for bits in (widths if now == EMPTY else [own.bits]) for rows in range(own.rows, 0, -1)]


def _with_more_states(problem: AllocationProblem, answer: _Answer) -> Iterator[_Answer]:
    """For each class with states: the answer in which all its channels have as many more as there are bits for."""
    members = torch.bincount(answer.level, minlength=len(answer.classes)).tolist()
    for number, (choice, channels) in enumerate(zip(answer.classes, members, strict=True)):
        if choice != EMPTY:
            more = problem.widest(choice, problem.channel_bits(choice) + answer.left // channels)
            levels = [*answer.classes[:number], more, *answer.classes[number + 1 :]]
            yield _answer(problem, levels, answer.level)


def _with_one_more_channel(problem: AllocationProblem, answer: _Answer, order: list[int]) -> Iterator[_Answer]:
    """For each class with states: the answer in which one more channel is in it, all of them with what fits."""
    waiting = [j for j in order if answer.classes[int(answer.level[j])] == EMPTY]
    members = torch.bincount(answer.level, minlength=len(answer.classes)).tolist()
    for number, (choice, channels) in enumerate(zip(answer.classes, members, strict=True)):
        if choice != EMPTY and waiting:
            share = (problem.channel_bits(choice) * channels + answer.left) // (channels + 1)
            level = answer.level.clone()
            level[waiting[0]] = number
            fewer = problem.widest(choice, share)
            levels = [*answer.classes[:number], fewer, *answer.classes[number + 1 :]]
            if fewer != EMPTY:
                yield _answer(problem, levels, level)
