"""What an operator is: how the members of a bucket become a state, and how the rows' candidates become a weight."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """One way to fill and to read a sketch. Operators are stateless.

    Both directions work on encoded values, so that what runs over every weight is one gather and one reduction.

    Attributes:
        keeps_member: Whether a state is its bucket's member of least encoded value, the winner that projections follow.
        pad: Encoded value that leaves :meth:`reduce` unchanged; fills the slots of buckets that are one short.
    """

    keeps_member: bool
    pad: int | float

    def encode(self, weights: Tensor) -> Tensor:
        """Bring fp32 weights (any shape, may be overwritten) into the form that :meth:`reduce` reads."""
        ...

    def reduce(self, slots: Tensor, load: Tensor) -> Tensor:
        """States of all buckets, still encoded, [rows, states, channels].

        Args:
            slots: Encoded members [rows, slots, states, channels]; unused slots hold ``pad``.
            load: Members per bucket, int32 [rows, states, 1].
        """
        ...

    def decode(self, states: Tensor) -> Tensor:
        """Encoded states (any shape) as fp32; 0 or NaN where a bucket had no member."""
        ...

    def encode_codes(self, codes: Tensor, query: str) -> Tensor:
        """Bring quantised states (int8 or int16, any shape) into the form that :meth:`combine` reads."""
        ...

    def combine(self, candidates: Tensor) -> Tensor:
        """Join the rows' encoded candidates [rows, n, channels] into [n, channels]."""
        ...

    def decode_codes(self, joined: Tensor, query: str) -> Tensor:
        """Joined candidates (any shape) as integers."""
        ...

    def divisor(self, rows: int) -> int:
        """What the joined integers are divided by: weight = integer * scale / divisor."""
        ...

    def derivative(self, candidates: Tensor) -> Tensor:
        """Derivative of the joined integers by each row's candidate, bool [rows, n, channels].

        Args:
            candidates: Encoded, as for :meth:`combine`.
        """
        ...


def first_taken(candidates: Tensor, joined: Tensor) -> Tensor:
    """Where a row's candidate is the one that was taken, bool [rows, n, channels]; of equal ones the first.

    Args:
        candidates: [rows, n, channels].
        joined: [n, channels].
    """
    equal = candidates == joined
    return equal & (equal.cumsum(0, dtype=torch.int8) == 1)


def in_order(slots: Tensor) -> Tensor:
    """Sum over the slots one after another: the order that every device and kernel keeps to, so that bits agree.

    Args:
        slots: fp32 [rows, slots, states, channels].

    Returns:
        fp32 [rows, states, channels].
    """
    total = slots[:, 0].clone()
    for slot in range(1, slots.shape[1]):
        total += slots[:, slot]
    return total
