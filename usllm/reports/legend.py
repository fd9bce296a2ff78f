"""What colours, markers and dashes mean, below a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from usllm.reports.runs import Run
from usllm.reports.style import (
    DENSE_COLOUR,
    INK,
    OTHER_DASHES,
    OTHER_MARKER,
    ROW_DASHES,
    ROW_MARKERS,
    SOFT,
    allocation_colour,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

ONE_LINE = 6
"""Entries that fit beside each other below a figure of half the page's width."""
FRONT = "Pareto front"
_Entries = list[tuple["Line2D", str]]


def point_legend(figure: Figure, runs: Sequence[Run], front: bool) -> None:
    """Colours are allocation rules, markers rows of the sketch.

    Args:
        figure: Gets the legend.
        runs: The runs that were drawn.
        front: Whether a Pareto front was drawn.
    """
    from matplotlib.lines import Line2D

    colours = [
        (Line2D([], [], marker="o", ls="none", ms=7, color=allocation_colour(name)), str(name))
        for name in dict.fromkeys(run.allocation for run in runs)
    ]
    markers = []
    for rows in _rows(runs):
        marker = ROW_MARKERS.get(rows, OTHER_MARKER)
        markers.append((Line2D([], [], marker=marker, ls="none", ms=7, mfc="none", color=INK), _rows_name(rows)))
    if front:
        markers.append((Line2D([], [], color=SOFT, lw=1.1, alpha=0.75), FRONT))
    _below(figure, colours, markers)


def line_legend(figure: Figure, runs: Sequence[Run]) -> None:
    """Colours are allocation rules, dashes rows of the sketch.

    Args:
        figure: Gets the legend.
        runs: The runs that were drawn.
    """
    from matplotlib.lines import Line2D

    sketched = [run for run in runs if not run.dense]
    colours = [
        (Line2D([], [], color=allocation_colour(name)), str(name))
        for name in dict.fromkeys(run.allocation for run in sketched)
    ]
    if len(sketched) < len(runs):
        colours.append((Line2D([], [], color=DENSE_COLOUR), "dense"))
    dashes = [
        (Line2D([], [], color=INK, ls=ROW_DASHES.get(rows, OTHER_DASHES)), _rows_name(rows)) for rows in _rows(sketched)
    ]
    _below(figure, colours, dashes)


def _below(figure: Figure, first: _Entries, second: _Entries) -> None:
    """Both kinds of entries in one line, or one below the other where they are many."""
    from matplotlib.lines import Line2D

    if not first and not second:
        return
    if len(first) + len(second) <= ONE_LINE:
        columns, entries = ONE_LINE, [*first, *second]
    else:  # matplotlib fills column by column
        columns = max(len(first), len(second))
        blank = (Line2D([], [], ls="none"), "")
        padded = [kind + [blank] * (columns - len(kind)) for kind in (first, second)]
        entries = [entry for pair in zip(*padded, strict=True) for entry in pair]
    handles = [handle for handle, _ in entries]
    legend = figure.legend(handles, ["-"] * len(handles), loc="outside lower center", ncols=columns)
    for shown, (_, name) in zip(legend.get_texts(), entries, strict=True):
        shown.set_text(shortened(name, 24))  # as it is: a label that begins with an underscore would be dropped


def _rows(runs: Sequence[Run]) -> list[int]:
    return sorted({run.rows or 1 for run in runs})


def _rows_name(rows: int) -> str:
    return f"{rows} row{'s' if rows != 1 else ''}"
