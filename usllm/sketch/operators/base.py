"""What an operator is: how the members of a bucket become a state, and how the rows' candidates become a weight."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Operator(Protocol):
    """One way to fill and to read a sketch. Operators are stateless; they see blocks of one class of channels.

    Attributes:
        linear: Whether decoding is linear in the states, so that products may be folded (`peers.md` §3).
        pad: Encoded value that leaves :meth:`reduce` unchanged; fills the slots of buckets that are one short.
    """

    linear: bool
    pad: int | float

    def encode(self, block: Tensor) -> Tensor:
        """Bring fp32 weights (any shape, may be overwritten) into the form that :meth:`reduce` reads."""
        ...

    def reduce(self, slots: Tensor, load: Tensor) -> Tensor:
        """States of all buckets, still encoded, [rows, states, channels].

        Args:
            slots: Encoded members [rows, slots, states, channels]; unused slots hold ``pad``.
            load: Members per bucket, int64 [rows, states, 1].
        """
        ...

    def decode(self, states: Tensor) -> Tensor:
        """Encoded states (any shape) as fp32; 0 where a bucket had no member."""
        ...

    def combine(self, candidates: Tensor, query: str) -> Tensor:
        """Join the rows' candidate codes [rows, n, channels] (int8 or int16) into integers [n, channels]."""
        ...

    def divisor(self, rows: int) -> int:
        """What the joined integers are divided by: weight = integer * scale / divisor."""
        ...
