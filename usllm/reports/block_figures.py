"""Errors of reconstructed blocks over depth, of all runs of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from usllm.reports.labels import labels
from usllm.reports.runs import Run
from usllm.reports.style import ROW_DASHES, allocation_colour, new_figure, shortened, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 14
"""Runs in the legend; of more, it would cover the curves."""
_PANELS = {
    "stream_error": "Error of the stream behind each block",
    "increment_error": "Error of what each block adds",
}


@styled
def block_errors(runs: Sequence[Run]) -> Figure | None:
    """How far each reconstructed block is from the dense one: of the whole stream, and of what the block adds to it.

    Returns:
        The figure; ``None`` where no run has reconstructed.
    """
    shown = [run for run in runs if run.blocks]
    if not shown:
        return None
    figure, axes = new_figure(4.9 * len(_PANELS) + 0.6, 3.6, 1, len(_PANELS))
    names = labels(runs)
    for place, (panel, (key, title)) in enumerate(zip(axes, _PANELS.items(), strict=True)):
        for number, run in enumerate(shown):
            points = [(block["block"], block[key]) for block in run.blocks if key in block]
            (line,) = panel.plot(
                [block for block, _ in points],
                [value for _, value in points],
                color=allocation_colour(run.allocation),
                linestyle=list(ROW_DASHES.values())[number % len(ROW_DASHES)],
                marker="o",
                markersize=3,
                linewidth=1.2,
                label=shortened(names[run.name]),
            )
            line.set_gid(f"blocks-{place}-{number}")
        panel.set_title(title)
        panel.set_xlabel("block")
        panel.set_ylim(bottom=0)
        panel.grid(True)
    axes[0].set_ylabel("squared, of the target's energy")
    axes[1].set_ylabel("norm, of the dense increment's")
    if 1 < len(shown) <= NAMED:
        axes[0].legend(fontsize=8)
    return figure
