"""Which blocks are trained together, in which order, and the streams that enter and leave them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from usllm.stages.block_arguments import Arguments
from usllm.stages.blocks import Room, run_block


@dataclass(frozen=True)
class BlockWindow:
    """Blocks that are trained together.

    Attributes:
        number: Of the window, from 0.
        blocks: Of the model, from the first to the one after the last.
        new: Those of them that no window before has held.
        leaving: Those that no window after will hold.
    """

    number: int
    blocks: range
    new: range
    leaving: range


def block_windows(count: int, size: int, stride: int) -> list[BlockWindow]:
    """Windows over the blocks of a model; the last one ends with the last block.

    Args:
        count: Blocks of the model.
        size: Of a window.
        stride: Blocks from the beginning of one window to that of the next, at most ``size``.
    """
    found: list[BlockWindow] = []
    seen, first = 0, 0
    while True:
        end = min(first + size, count)
        leaving = range(first, count if end == count else first + stride)
        found.append(BlockWindow(len(found), range(first, end), range(max(seen, first), end), leaving))
        if end == count:
            return found
        seen, first = end, first + stride


class DenseStreams:
    """The dense model's hidden states between its blocks, as far as the present window needs them.

    Args:
        stream: That enters the first block, [sequences, context, hidden].
        block: Gives a block of the dense model by its number.
        arguments: What each is called with besides.
        batch_size: Sequences of a forward pass.
        context: Makes the context of forward passes.
        room: Where streams are to live; ``None``: where the first one does.
    """

    def __init__(
        self,
        stream: Tensor,
        block: Callable[[int], nn.Module],
        arguments: Sequence[Arguments],
        batch_size: int,
        context: Callable[[], AbstractContextManager[Any]],
        room: Room | None = None,
    ) -> None:
        self._streams = {0: stream}
        self._block, self._arguments, self._room = block, arguments, room
        self._batch_size, self._context = batch_size, context

    def before(self, block: int) -> Tensor:
        """The stream that enters a block, or leaves the one before it; not one that was forgotten."""
        known = max(number for number in self._streams if number <= block)
        for number in range(known, block):
            stream = self._streams[number]
            after = None if self._room is None else self._room(stream.shape, stream.dtype)
            self._streams[number + 1] = run_block(
                self._block(number), stream, self._arguments[number], self._batch_size, self._context, after
            )
        return self._streams[block]

    def forget_before(self, block: int) -> None:
        """Give back the memory of the streams that enter the blocks before this one."""
        self._streams = {number: stream for number, stream in self._streams.items() if number >= block}
