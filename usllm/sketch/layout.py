"""How a channel is cut into groups: pure integer geometry, shared by every operator, allocation and kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A run of groups of one size.

    Attributes:
        start: First output row of the run.
        size: Weights n in each group.
        groups: Number of groups.
        first_group: Number of the first group within the channel.
    """

    start: int
    size: int
    groups: int
    first_group: int


def spans(out_features: int, group_size: int) -> tuple[Span, ...]:
    """Cut ``out_features`` rows into ⌈out/G⌉ groups whose sizes differ by at most one, larger ones first."""
    groups = -(-out_features // group_size)
    small, larger = divmod(out_features, groups)
    runs = (Span(0, small + 1, larger, 0), Span(larger * (small + 1), small, groups - larger, larger))
    return tuple(run for run in runs if run.groups)


def states_per_channel(runs: tuple[Span, ...], rows: int, states: int) -> int:
    """States of one channel over all rows and groups; a group holds at most as many states as weights."""
    return rows * sum(run.groups * min(states, run.size) for run in runs)
