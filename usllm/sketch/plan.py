"""Plans: everything needed to place the states of one layer. Integers only, no index per weight."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from usllm.sketch.bits import bit_breakdown
from usllm.sketch.classes import ChannelClass
from usllm.sketch.config import SketchConfig
from usllm.sketch.hash import HASHES, first_rotation, layer_key
from usllm.sketch.layout import Span, spans, states_per_channel
from usllm.sketch.operators import OPERATORS, Operator


@dataclass(frozen=True)
class ClassBlock:
    """The channels of one class and where their states lie.

    Attributes:
        choice: Rows, states per group, width.
        channels: int64 [channels], rising.
        first_state: Offset of the block in the layer's states, which are ordered by class, channel, group, row.
        states_per_channel: States of one channel.
    """

    choice: ChannelClass
    channels: Tensor
    first_state: int
    states_per_channel: int

    @property
    def num_states(self) -> int:
        return len(self.channels) * self.states_per_channel


class Placement(NamedTuple):
    """The hash of one class in groups of one size, int16: what projection gathers and what a query looks up.

    Attributes:
        buckets: Bucket of each rotated position, [rows, n].
        slots: Positions that share each bucket, [rows, slots, K]; unused slots hold n.
        load: Members of each bucket, [rows, K].
    """

    buckets: Tensor
    slots: Tensor
    load: Tensor


_numbers = itertools.count()
_living: WeakValueDictionary[str, Plan] = WeakValueDictionary()


def living_plan(handle: str) -> Plan:
    """The plan of this process with that ``handle``: ``torch.compile`` takes a string where it takes no object."""
    return _living[handle]


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the states of one layer are.

    Attributes:
        name: Stable layer name; part of the hash key.
        shape: ``(out, in)`` of the weight.
        config: The sketch configuration (format constants among it).
        classes: Up to 16 classes of channels.
        channel_class: uint8 [in].
        handle: Name of this object in this process, for :func:`living_plan`.
    """

    name: str
    shape: tuple[int, int]
    config: SketchConfig
    classes: tuple[ChannelClass, ...]
    channel_class: Tensor
    handle: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", f"plan {next(_numbers)}")
        _living[self.handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # a copy is another object

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Runs of equally large groups."""
        return spans(self.shape[0], self.config.group_size)

    @cached_property
    def key(self) -> int:
        """32-bit hash key of the layer."""
        return layer_key(self.config.seed, self.name)

    @property
    def operator(self) -> Operator:
        return OPERATORS[self.config.operator]

    @cached_property
    def blocks(self) -> tuple[ClassBlock, ...]:
        """Classes that hold states, in storage order."""
        found, first = [], 0
        for class_index, choice in enumerate(self.classes):
            per_channel = states_per_channel(self.spans, choice.rows, choice.states)
            if per_channel:
                channels = (self.channel_class == class_index).nonzero().flatten()
                found.append(ClassBlock(choice, channels, first, per_channel))
                first += found[-1].num_states
        return tuple(found)

    @cached_property
    def num_states(self) -> int:
        return sum(block.num_states for block in self.blocks)

    @cached_property
    def num_active(self) -> int:
        """Channels that hold states; each has one scale."""
        return sum(len(block.channels) for block in self.blocks)

    @property
    def code_dtype(self) -> torch.dtype:
        """Type of the unpacked state codes."""
        return torch.int16 if any(block.choice.bits > 8 for block in self.blocks) else torch.int8

    def state_tensors(self, device: torch.device | str = "cpu", *, filled: bool = True) -> dict[str, Tensor]:
        """States of this plan: the names, shapes and types that :func:`usllm.sketch.project` returns.

        Args:
            device: Of the tensors.
            filled: With zeros; otherwise with whatever the memory held.
        """
        sizes = {"codes": self.num_states, "scales": self.num_active, "scale_base": 1}
        if self.config.output_scale:
            sizes |= {"output_scales": self.shape[0], "output_scale_base": 1}
        make = torch.zeros if filled else torch.empty
        return {
            name: make(size, dtype=self.code_dtype if name == "codes" else torch.uint8, device=device)
            for name, size in sizes.items()
        }

    def rotation(self, span: Span) -> int:
        """Rotation of channel 0 in a span's first group; the next channel's is :attr:`rotation_step` further."""
        return (first_rotation(self.key, span.size) + self.rotation_step * span.first_group * self.shape[1]) % span.size

    @property
    def rotation_step(self) -> int:
        """How much further the next channel is rotated, and after the last one the first of the next group: 0 or 1."""
        return int(HASHES[self.config.hash].rotates)

    @cached_property
    def channel_order(self) -> Tensor:
        """Channels that hold states in storage order, by class, then by channel; int64 [num_active]."""
        return (
            torch.cat([block.channels for block in self.blocks]) if self.blocks else torch.zeros(0, dtype=torch.int64)
        )

    def per_channel(self, values: Sequence[int]) -> Tensor:
        """A number for each block, repeated for each of its channels, in storage order; int32 [num_active]."""
        counts = torch.tensor([len(block.channels) for block in self.blocks])
        return torch.tensor(values, dtype=torch.int32).repeat_interleave(counts)

    @cached_property
    def divisors(self) -> Tensor | None:
        """What joined codes are divided by, int32 [channels with states]; ``None`` where that is 1 for all."""
        divisors = [self.operator.divisor(block.choice.rows) for block in self.blocks]
        return self.per_channel(divisors) if any(divisor != 1 for divisor in divisors) else None

    @cached_property
    def _tables(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By group size: the hash tables of all rows and their argsort, both int64 [rows, n]."""
        rows = max((block.choice.rows for block in self.blocks), default=1)
        tables = {}
        for n in {span.size for span in self.spans}:
            table = torch.stack([HASHES[self.config.hash].table(self.key, row, n) for row in range(rows)])
            tables[n] = (table, torch.argsort(table, dim=1, stable=True))
        return tables

    @cached_property
    def _placements(self) -> dict[tuple[ChannelClass, int], Placement]:
        return {}

    def placement(self, choice: ChannelClass, n: int) -> Placement:
        """Where the weights of a group of ``n`` go in one class; a few KiB for each class, shared by all channels."""
        key = (choice, n)
        if key not in self._placements:
            table, order = (values[: choice.rows] for values in self._tables[n])
            states = min(choice.states, n)
            spread = HASHES[self.config.hash]
            slots = spread.slots(table, order, states)
            self._placements[key] = Placement(
                buckets=spread.bucket(table, states).to(torch.int16),
                slots=slots.to(torch.int16),
                load=(slots < n).sum(1).to(torch.int16),
            )
        return self._placements[key]

    @cached_property
    def load_counts(self) -> Tensor:
        """How many states have 0, 1, 2 … members, int64 [largest load + 1]."""
        counts = torch.zeros(1, dtype=torch.int64)
        for block in self.blocks:
            for span in self.spans:
                loads = self.placement(block.choice, span.size).load
                one = torch.bincount(loads.flatten().int()) * len(block.channels) * span.groups
                longer, shorter = (one, counts) if len(one) > len(counts) else (counts, one)
                counts = longer.clone()
                counts[: len(shorter)] += shorter
        return counts

    @cached_property
    def has_empty_states(self) -> bool:
        """Whether the hash left a state without a member."""
        return bool(self.load_counts[0])

    def occupancy(self) -> float:
        """Share of states with at least one member; 1.0 where there are no states."""
        return 1.0 - float(self.load_counts[0]) / max(int(self.load_counts.sum()), 1)

    def load(self) -> tuple[int, float, int]:
        """Fewest, mean and most members per state."""
        counts = self.load_counts
        present = counts.nonzero().flatten()
        if not len(present):
            return 0, 0.0, 0
        mean = float((counts * torch.arange(len(counts))).sum() / counts.sum())
        return int(present[0]), mean, int(present[-1])

    def bit_breakdown(self) -> dict[str, int]:
        """Bits of each section of the packed layer."""
        return dict(self._sections)

    @cached_property
    def _sections(self) -> dict[str, int]:
        return bit_breakdown(self)

    @property
    def total_bits(self) -> int:
        """Bits of the packed layer, padding and metadata included."""
        return sum(self.bit_breakdown().values())

    @property
    def bits_per_weight(self) -> float:
        return self.total_bits / (self.shape[0] * self.shape[1])

    def to_tensors(self) -> dict[str, Tensor]:
        """The plan as it is stored: int32 ``classes`` [classes, 3] and uint8 ``channel_class`` [in]."""
        return {"classes": torch.tensor(self.classes, dtype=torch.int32), "channel_class": self.channel_class}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], config: SketchConfig, name: str
    ) -> Plan:
        """Inverse of :meth:`to_tensors`."""
        classes = tuple(ChannelClass(*row) for row in tensors["classes"].tolist())
        return cls(name, shape, config, classes, tensors["channel_class"].cpu())
