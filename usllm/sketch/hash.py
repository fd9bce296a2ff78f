"""Integer hashing: which bucket a weight falls into, the same on every device and in every process.

The hash of weight ``i`` of a group of ``n`` weights, in input channel ``c`` and group ``g``, row ``r``, is::

    q      = (i - rotation(c, g)) mod n                     # a rotation per channel and group
    bucket = table_r[q] mod K          (balanced)           # table_r is a permutation of 0 … n-1
    bucket = (table_r[q] * K) >> 16    (uniform)            # table_r holds independent 16-bit numbers

    bucket = table_r[q] mod K          (shared)             # rotation(c, g) is the same for all c and g

so one small table per row serves a whole layer, and no hash is evaluated and no index stored per weight
(`docs/method.md` §3). The rotation changes from channel to channel and group to group by one, which visits all n
rotations before one repeats: two weights that share a state in one channel part in the next. ``shared`` does without:
outputs that share a bucket do so in every channel. Tables and the first rotation depend on (seed, layer name) alone, by
32-bit multiply, shift and xor.

Everything here is a format constant (``HASH_VERSION``): changing it changes what stored states mean.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

HASH_VERSION = 1

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive row numbers
_ROTATION_STREAM = 0x0000FFFF  # a row number that no row can have


def mix32(value: int) -> int:
    """Bijective finaliser of 32-bit integers (the published murmur3 constants)."""
    value &= _MASK
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def _mix32_tensor(value: Tensor) -> Tensor:
    """:func:`mix32` over an int64 tensor of 32-bit values; a wrapped product keeps its low 32 bits."""
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def layer_key(seed: int, name: str) -> int:
    """32-bit key of a layer: FNV-1a over the UTF-8 bytes of its name, mixed with the seed."""
    digest = 0x811C9DC5
    for byte in name.encode():
        digest = ((digest ^ byte) * 0x01000193) & _MASK
    return mix32(mix32(seed) ^ digest)


def _row_hashes(key: int, row: int, n: int) -> Tensor:
    stream = mix32(key ^ ((row + 1) * _GOLDEN & _MASK))
    return _mix32_tensor(torch.arange(n, dtype=torch.int64) ^ stream)


def first_rotation(key: int, n: int) -> int:
    """Rotation of channel 0 of group 0, in [0, n)."""
    return mix32(key ^ ((_ROTATION_STREAM + 1) * _GOLDEN & _MASK)) % n


class Hash(Protocol):
    """One way to spread n positions over K buckets; both halves must agree.

    Attributes:
        rotates: Whether the rotation changes from channel to channel and group to group.
    """

    rotates: bool

    def table(self, key: int, row: int, n: int) -> Tensor:
        """The row's table, int64 [n]."""
        ...

    def bucket(self, table: Tensor, states: int) -> Tensor:
        """Bucket of each position in [0, states), shape of ``table``; ``states`` < 2^16."""
        ...

    def slots(self, table: Tensor, order: Tensor, states: int) -> Tensor:
        """Members of each bucket.

        Args:
            table: int64 [rows, n].
            order: ``argsort(table)``, int64 [rows, n].
            states: K.

        Returns:
            int64 [rows, slots, K], positions; unused slots hold n.
        """
        ...


class Balanced:
    """A permutation taken modulo K: loads differ by at most one, no state is unoccupied."""

    rotates: bool = True

    def table(self, key: int, row: int, n: int) -> Tensor:
        order = torch.argsort(_row_hashes(key, row, n), stable=True)
        return torch.empty_like(order).scatter_(0, order, torch.arange(n))

    def bucket(self, table: Tensor, states: int) -> Tensor:
        return table % states

    def slots(self, table: Tensor, order: Tensor, states: int) -> Tensor:
        rows, n = order.shape
        depth = -(-n // states)
        return torch.nn.functional.pad(order, (0, depth * states - n), value=n).view(rows, depth, states)


class Uniform:
    """Independent 16-bit numbers scaled to K by multiply and shift: the paper's random buckets."""

    rotates: bool = True

    def table(self, key: int, row: int, n: int) -> Tensor:
        return _row_hashes(key, row, n) >> 16

    def bucket(self, table: Tensor, states: int) -> Tensor:
        return (table * states) >> 16

    def slots(self, table: Tensor, order: Tensor, states: int) -> Tensor:
        rows, n = order.shape
        bucket = self.bucket(table, states).gather(1, order)  # rises along each row
        load = torch.zeros(rows, states, dtype=torch.int64).scatter_add_(1, bucket, torch.ones_like(bucket))
        depth = torch.arange(n) - (load.cumsum(1) - load).gather(1, bucket)
        slots = torch.full((rows, int(load.max()), states), n)
        slots[torch.arange(rows)[:, None], depth, bucket] = order
        return slots


class Shared(Balanced):
    """The balanced hash without a rotation of its own for each channel: one hash for the whole layer."""

    rotates: bool = False


HASHES: dict[str, Hash] = {"balanced": Balanced(), "uniform": Uniform(), "shared": Shared()}
