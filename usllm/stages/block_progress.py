"""Progress of reconstruction: a bar with the time left, and one line for each finished block."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from usllm.stages.block_windows import BlockWindow


class BlockProgress:
    """Drawn while blocks are trained; to be used as a context.

    Args:
        windows: How many there are.
        steps: Of each.
        shown: Whether anything is.
    """

    def __init__(self, windows: int, steps: int, shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True))
        self._bar = Progress(*columns, disable=not shown, transient=True)
        self._task = self._bar.add_task("Reconstructing", total=windows * steps)
        self._steps, self._shown = steps, shown

    def __enter__(self) -> BlockProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stepped(self, window: BlockWindow, step: int, error: float) -> None:
        """A step was made."""
        first, last = window.blocks.start + 1, window.blocks.stop
        blocks = f"block {first}" if first == last else f"blocks {first} to {last}"
        done = window.number * self._steps + step + 1
        words = f"Reconstructing {blocks}, step {step + 1} of {self._steps}, error {error:.3f}"
        self._bar.update(self._task, completed=done, description=words)

    def finished(self, row: dict[str, Any], before: bool = False) -> None:
        """A block will not change any more.

        Args:
            row: What is reported of it.
            before: Whether an earlier call has trained it.
        """
        if self._shown:
            self._bar.console.print(
                f"block {row['block'] + 1}: error of the stream {row['stream_error']:.4f}, of what the block adds "
                f"{row['increment_error']:.4f}, {row['seconds']:.0f} s{', in an earlier call' if before else ''}",
                highlight=False,
                soft_wrap=True,
            )

    def window_done(self, number: int) -> None:
        """A window was trained, or read back."""
        self._bar.update(self._task, completed=(number + 1) * self._steps)
