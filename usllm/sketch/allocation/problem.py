"""The allocation problem of one layer, its costs in bits, and the integer table that solves it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from usllm.sketch.bits import CLASS_BITS, available_bits, code_bits
from usllm.sketch.classes import EMPTY, MAX_CLASSES, ChannelClass
from usllm.sketch.layout import Span, spans, states_per_channel
from usllm.sketch.scale import SCALE_BITS

if TYPE_CHECKING:
    from usllm.sketch.config import SketchConfig

_TABLE_SHARE = 0.125  # of the budget: a table that costs more takes fewer classes
_NEGLIGIBLE = 0.005  # of the budget: not worth a class of its own
_WASTED = 0.02  # of the budget: worth states of others


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
        importance: E[a²] per input channel, float64 [in], non-negative.
        weight_energy: E[w²] per input channel, float64 [in].
        kept: Channels that may hold states, bool [in]; at least one.
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

    @property
    def one_state(self) -> ChannelClass:
        """One state per row and group, of the configured rows and width."""
        return ChannelClass(self.config.rows, 1, self.config.state_bits)

    @property
    def negligible_bits(self) -> int:
        """So few bits left over are not worth a class of their own."""
        return int(_NEGLIGIBLE * self.budget_bits)

    @property
    def wasted_bits(self) -> int:
        """So many bits left over are worth a few states of other channels."""
        return int(_WASTED * self.budget_bits)

    def channel_bits(self, choice: ChannelClass) -> int:
        """Bits that one channel of this class stores: states and scale."""
        states = states_per_channel(self.spans, choice.rows, choice.states)
        return states * choice.bits + SCALE_BITS if states else 0

    def widest(self, choice: ChannelClass, bits: int) -> ChannelClass:
        """``choice`` with as many states as a channel of at most ``bits`` bits holds, EMPTY where none fits."""
        low, high = 0, self.largest_group
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.channel_bits(choice._replace(states=middle)) <= bits
            low, high = (middle, high) if fits else (low, middle - 1)
        return choice._replace(states=low) if low else EMPTY

    def max_classes(self) -> int:
        """Most classes whose table stays a small share of the budget (at least two, where two fit at all)."""
        for count in (MAX_CLASSES, 8, 4):
            if count * CLASS_BITS + self.shape[1] * code_bits(count) <= _TABLE_SHARE * self.budget_bits:
                return count
        return 2

    def available(self, classes: int) -> int:
        """Bits left for states and scales beside a table of ``classes`` classes; may be negative."""
        return available_bits(self.shape, self.config.output_scale, classes, self.budget_bits)

    def left_over(self, answer: AllocationTable) -> int:
        """Bits of the budget that an answer does not use; negative where it breaks the ceiling."""
        channels = answer.channel_class.bincount(minlength=len(answer.classes)).tolist()
        spent = sum(self.channel_bits(choice) * n for choice, n in zip(answer.classes, channels, strict=True))
        return self.available(len(answer.classes)) - spent
