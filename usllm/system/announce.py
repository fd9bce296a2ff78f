"""What takes minutes is said where no bar of its progress can be drawn."""

from __future__ import annotations

from rich.progress import Progress


def announce(bar: Progress, words: str) -> None:
    """Print a line above a progress bar that its console does not draw: in a file, or in another program's pipe.

    Args:
        bar: Begun. One that is disabled stays silent.
        words: Without a full stop.
    """
    console = bar.console
    if not bar.disable and not console.is_terminal and not console.is_jupyter:
        console.print(f"{words} …", markup=False, highlight=False)
