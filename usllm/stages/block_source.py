"""Where a stage that works block by block takes a model's blocks from, dense and compressed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

from usllm.data.batches import Batch
from usllm.stages.block_arguments import Arguments
from usllm.stages.blocks import Room, capture, decoder_blocks

if TYPE_CHECKING:
    from usllm.stages.base import Work
    from usllm.stages.block_windows import BlockWindow


class Entered(NamedTuple):
    """What the blocks of a model are fed.

    Attributes:
        student: The stream that enters the first compressed block, [sequences, context, hidden].
        dense: That which enters the first dense one.
        arguments: What each block is called with besides.
    """

    student: Tensor
    dense: Tensor
    arguments: list[Arguments]


class Kept(NamedTuple):
    """What is kept of a window of blocks that is finished, besides its tensors.

    Attributes:
        without: Names of tensors in the state dict of the window that nobody will ask for again.
        more: Plain Python.
    """

    without: frozenset[str] = frozenset()
    more: dict[str, Any] = {}  # noqa: RUF012 - never changed


class BlockSource(Protocol):
    """Blocks by their numbers; one that lends them makes them when asked, and takes them back.

    Attributes:
        count: Number of blocks.
        room: Where streams are to live; ``None``: on the device.
    """

    count: int
    room: Room | None

    def name(self, number: int) -> str:
        """Name of a block in the model."""

    def enter(self, batches: Sequence[Batch]) -> Entered:
        """The streams that enter the first blocks, for batches as :func:`usllm.stages.blocks.capture` takes them."""

    def dense(self, number: int) -> nn.Module:
        """A dense block."""

    def window(self, window: BlockWindow) -> nn.ModuleList:
        """Compressed blocks: those that were in the window before as they are now, the new ones as they started."""

    def without_dense(self) -> None:
        """Dense blocks are not asked for while the present window is trained."""

    def kept(self, window: BlockWindow, blocks: nn.ModuleList) -> Kept:
        """What to keep of a window that was trained."""


class LoadedBlocks:
    """The blocks of a model in memory, and of a dense one beside it.

    Args:
        work: With its model started.
    """

    room: Room | None = None

    def __init__(self, work: Work) -> None:
        self._work = work
        self._teacher = work.load_dense().to(work.device).eval()
        self._blocks, self._dense = decoder_blocks(work.model), decoder_blocks(self._teacher)
        self._names = {id(module): name for name, module in self._teacher.named_modules()}
        self.count = len(self._blocks)

    def name(self, number: int) -> str:
        """Name of a block in the model."""
        return self._names[id(self._dense[number])]

    def enter(self, batches: Sequence[Batch]) -> Entered:
        """The streams that enter the first blocks, for batches as :func:`usllm.stages.blocks.capture` takes them."""
        with self._work.context():
            student, arguments = capture(self._work.model, self._blocks, batches, self._work.device)
            dense, _ = capture(self._teacher, self._dense, batches, self._work.device)
        return Entered(student, dense, arguments)

    def dense(self, number: int) -> nn.Module:
        """A dense block."""
        return self._dense[number]

    def window(self, window: BlockWindow) -> nn.ModuleList:
        """Blocks of the model itself."""
        return nn.ModuleList(self._blocks[number] for number in window.blocks)

    def without_dense(self) -> None:
        """Nothing: the dense model stays."""

    def kept(self, window: BlockWindow, blocks: nn.ModuleList) -> Kept:
        """All tensors: the model is trained end to end afterwards."""
        return Kept()
