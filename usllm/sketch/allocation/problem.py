"""The allocation problem of one layer, its costs in bits, and the integer table that solves it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from usllm.sketch.bits import CLASS_BITS, available_bits, code_bits
from usllm.sketch.classes import ChannelClass
from usllm.sketch.layout import Span, spans, states_per_channel
from usllm.sketch.scale import SCALE_BITS

if TYPE_CHECKING:
    from usllm.sketch.config import SketchConfig

_TABLE_SHARE = 0.125  # of the budget: a table that costs more takes fewer classes


class AllocationTable(NamedTuple):
    """The answer: up to 16 classes, and the class of each input channel, uint8 [in]."""

    classes: tuple[ChannelClass, ...]
    channel_class: Tensor


@dataclass(frozen=True)
class AllocationProblem:
    """Share the bits of one layer out over its input channels.

    Attributes:
        name: Layer name, for messages.
        shape: ``(out, in)``.
        config: The sketch configuration.
        importance: E[a²] per input channel, float64 [in], non-negative, channels under the threshold set to 0.
        weight_energy: E[w²] per input channel, float64 [in].
        kept: Channels that may hold states, bool [in].
        budget_bits: Ceiling on all bits of the layer.
    """

    name: str
    shape: tuple[int, int]
    config: SketchConfig
    importance: Tensor
    weight_energy: Tensor
    kept: Tensor
    budget_bits: int

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        return spans(self.shape[0], self.config.group_size)

    @property
    def largest_group(self) -> int:
        """K can be at most this many."""
        return self.spans[0].size

    def channel_bits(self, choice: ChannelClass) -> int:
        """Bits that one channel of this class stores: states and scale."""
        states = states_per_channel(self.spans, choice.rows, choice.states)
        return states * choice.bits + SCALE_BITS if states else 0

    def max_classes(self) -> int:
        """Most classes whose table stays a small share of the budget (at least two, where two fit at all)."""
        for count in (16, 8, 4):
            if count * CLASS_BITS + self.shape[1] * code_bits(count) <= _TABLE_SHARE * self.budget_bits:
                return count
        return 2

    def available(self, classes: int) -> int:
        """Bits left for states and scales beside a table of ``classes`` classes; may be negative."""
        return available_bits(self.shape, self.config.output_scale, classes, self.budget_bits)


def fill(problem: AllocationProblem, levels: list[ChannelClass], level: Tensor, order: list[int], left: int) -> int:
    """Raise channels to the next level, one step a turn in the given order, while the bits last.

    Args:
        problem: The layer.
        levels: Classes by rising cost.
        level: int64 [in], index into ``levels`` per channel; changed in place.
        order: Channels, first served first.
        left: Bits left.

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


def table(problem: AllocationProblem, levels: list[ChannelClass], level: Tensor, order: list[int]) -> AllocationTable:
    """Drop unused levels, spend the bits that a smaller table frees on the levels that stay, and number these."""
    used, inverse = torch.unique(level, return_inverse=True)
    kept = [levels[i] for i in used.tolist()]
    spent = sum(problem.channel_bits(kept[i]) for i in inverse.tolist())
    fill(problem, kept, inverse, order, problem.available(len(kept)) - spent)
    used, inverse = torch.unique(inverse, return_inverse=True)
    return AllocationTable(tuple(kept[i] for i in used.tolist()), inverse.to(torch.uint8))
