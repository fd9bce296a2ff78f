"""Codes in output order: the layout that answers fast, made once from states and never stored.

States lie in hash order, so whoever multiplies with them evaluates the hash for every token. Here each weight's code
lies where its output and its input are, as bit planes, and inputs whose channels store nothing are left out:

    weight[o, channels[c]] = code[o, c] * scales[c] * factors[group of c, o]
    code[o, c] = step * Σ_p 2^p (±1)[p, o, c] + shift

One plane is a sign, so a code of one bit takes one bit of memory. The signs of 64 outputs and 32 columns lie together,
a word of 32 bits for each output: a vector register takes the words of many outputs, and four bits of each choose among
the 16 sums that the inputs of four columns can have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

OUTPUTS = 64
"""Whose words lie together."""
COLUMNS = 32
"""Of a word."""


class Levels(NamedTuple):
    """The whole numbers that codes of one width stand for: ``least``, ``least + stride``, … ``most``."""

    least: int
    most: int
    stride: int

    @property
    def signs(self) -> bool:
        """Whether they are -1 and 1."""
        return self == SIGNS

    @property
    def bits(self) -> int:
        """Planes that tell them apart."""
        return max(((self.most - self.least) // self.stride).bit_length(), 1)

    @property
    def step(self) -> float:
        """What the lowest plane's sign is worth."""
        return self.stride / 2

    @property
    def shift(self) -> float:
        """What is added to the planes' sum."""
        return self.step * ((1 << self.bits) - 1) + self.least


SIGNS = Levels(-1, 1, 2)


@dataclass(frozen=True, eq=False)
class Planes:
    """The codes of some of a layer's channels, all of one width.

    Attributes:
        shape: ``(out, in)`` of the layer's weight.
        levels: Of the codes.
        channels: Input of each column, int32 [columns], a multiple of 32 for each group.
        scales: What one unit of a code is worth, fp32 [columns]; 0 in columns that fill up a word.
        words: int32 [planes, blocks of 64 outputs, columns / 32, 64]; bit ``c`` belongs to column ``c`` of the word, 1
            is positive.
        factors: Of each group of columns and output, fp32 [groups, blocks * 64]; groups have equally many columns.
    """

    shape: tuple[int, int]
    levels: Levels
    channels: Tensor
    scales: Tensor
    words: Tensor
    factors: Tensor

    @property
    def columns(self) -> int:
        """Those that fill up words included."""
        return len(self.channels)

    @property
    def groups(self) -> int:
        """Of columns that share a factor for each output."""
        return len(self.factors)

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Channels, scales, words and factors."""
        return self.channels, self.scales, self.words, self.factors

    @cached_property
    def arrays(self) -> tuple[Any, Any, Any, Any]:
        """The same as NumPy arrays over the same memory, of planes on the CPU."""
        channels, scales, words, factors = (tensor.numpy() for tensor in self.tensors)
        return channels, scales, words, factors


def planes_bytes(outputs: int, columns: int, levels: Levels, group_size: int | None = None) -> int:
    """Memory of :func:`usllm_kernels.make_planes` of so many columns, before there are any.

    Args:
        outputs: Of the layer.
        columns: Of all groups together.
        levels: Of the codes.
        group_size: Columns that share a factor; ``None``: all.
    """
    _, groups, wide = group_sizes(columns, group_size)
    return _whole(outputs, OUTPUTS) * (levels.bits * groups * wide // 8 + 4 * groups) + 8 * groups * wide


def group_sizes(columns: int, group_size: int | None) -> tuple[int, int, int]:
    """Columns of a group, groups, and columns of a group in whole words."""
    size = max(columns, 1) if group_size is None else min(group_size, max(columns, 1))
    return size, max(-(-columns // size), 1), _whole(size, COLUMNS) if columns else 0


def _whole(number: int, of: int) -> int:
    return -(-number // of) * of
