"""Codes in output order: the layout that answers fast, made once from states and never stored.

States lie in hash order, so whoever multiplies with them evaluates the hash for every token. Here each weight's code
lies where its output and its input are, as signs, and inputs whose channels store nothing are left out:

    weight[o, i] = (Σ over the columns c of channel i of ±scales[c] + offsets[c]) * factors[group of c, o]

A code of one bit is one column of signs; a wider one is a column for each of its bits, worth a power of two each. So a
layer of many widths is one matrix of signs. Those of 64 outputs and 32 columns lie together, a word of 32 bits for each
output: a vector register takes the words of many outputs, and four bits of each choose among the 16 sums that four
columns can have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
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
    def bits(self) -> int:
        """Columns that tell them apart."""
        return max(((self.most - self.least) // self.stride).bit_length(), 1)

    @property
    def step(self) -> float:
        """What the sign of the lowest bit is worth."""
        return self.stride / 2

    @property
    def shift(self) -> float:
        """What is added to the signs' sum."""
        return self.step * ((1 << self.bits) - 1) + self.least


SIGNS = Levels(-1, 1, 2)


@dataclass(frozen=True, eq=False)
class Planes:
    """A layer's codes in output order.

    Attributes:
        shape: ``(out, in)`` of the layer's weight.
        channels: Input of each column, int32 [columns]: a multiple of 32 in each group. Those of one channel follow
            each other.
        starts: First column of each channel, and their end, int32 [channels + 1]; columns that fill up a word belong to
            the channel before them.
        scales: What a column's sign is worth, fp32 [columns]; 0 in columns that fill up a word.
        offsets: What is added to the signs, fp32 [columns]; all 0 but for one column of a wide code.
        words: int32 [blocks of 64 outputs, columns / 32, 64]; bit ``c`` is that of column ``c`` of the word, 1 is +1.
        factors: Of each group of columns and output, fp32 [groups, blocks * 64]; groups have equally many columns.
    """

    shape: tuple[int, int]
    channels: Tensor
    starts: Tensor
    scales: Tensor
    offsets: Tensor
    words: Tensor
    factors: Tensor

    @property
    def columns(self) -> int:
        """Those that fill up words included."""
        return self.channels.shape[0]

    @property
    def groups(self) -> int:
        """Of columns that share a factor for each output."""
        return self.factors.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Channels, starts, scales, offsets, words and factors."""
        return self.channels, self.starts, self.scales, self.offsets, self.words, self.factors

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # a copy lies at other addresses

    @cached_property
    def addresses(self) -> tuple[int, int, int, int, int, int]:
        """Where the tensors begin, for code that is told no more of them.

        Raises:
            ValueError: One is not contiguous, not on the CPU, or of another type or shape.
        """
        whole_numbers, floats = (self.channels, self.starts, self.words), (self.scales, self.offsets, self.factors)
        for kind, tensors in ((torch.int32, whole_numbers), (torch.float32, floats)):
            if any(tensor.dtype != kind or not tensor.is_contiguous() or not tensor.is_cpu for tensor in tensors):
                raise ValueError(
                    f"planes of {self.shape} have a tensor that is not contiguous or not {kind} on the CPU"
                )
        blocks, columns = self.words.shape[0], self.columns
        shapes = [(columns,), (columns,), (blocks, columns // COLUMNS, OUTPUTS), (self.groups, blocks * OUTPUTS)]
        if [tuple(t.shape) for t in (self.scales, self.offsets, self.words, self.factors)] != shapes:
            raise ValueError(f"planes of {self.shape} have a tensor of another shape than their {columns} columns need")
        channels, starts, scales, offsets, words, factors = (tensor.data_ptr() for tensor in self.tensors)
        return channels, starts, scales, offsets, words, factors


def planes_bytes(outputs: int, widths: Sequence[tuple[int, Levels]], group_size: int | None = None) -> int:
    """Memory of :func:`usllm_kernels.make_planes`, before there are any.

    Args:
        outputs: Of the layer.
        widths: Numbers of channels, and levels of their codes.
        group_size: Channels that share a factor, all of one width; ``None``: all do.
    """
    columns = sum(count * levels.bits for count, levels in widths)
    size = None if group_size is None else group_size * widths[0][1].bits
    _, groups, wide = group_sizes(columns, size)
    channels = sum(count for count, _ in widths)
    by_column = 12 * groups * wide + 4 * (channels + 1)
    return whole(outputs, OUTPUTS) * (groups * wide // 8 + 4 * groups) + by_column


def group_sizes(columns: int, group_size: int | None) -> tuple[int, int, int]:
    """Columns of a group, groups, and columns of a group in whole words."""
    size = max(columns, 1) if group_size is None else min(group_size, max(columns, 1))
    return size, max(-(-columns // size), 1), whole(size, COLUMNS) if columns else 0


def whole(number: int, of: int) -> int:
    """The least multiple that is not below a number."""
    return -(-number // of) * of
