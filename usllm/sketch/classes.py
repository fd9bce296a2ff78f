"""Classes of channels: what all channels of one class store."""

from __future__ import annotations

from typing import NamedTuple

MAX_CLASSES = 16


class ChannelClass(NamedTuple):
    """What all channels of one class store.

    Attributes:
        rows: Hash functions in use.
        states: States K per row and group (a shorter group holds no more than its size).
        bits: Width of a state.
    """

    rows: int
    states: int
    bits: int


EMPTY = ChannelClass(0, 0, 0)
