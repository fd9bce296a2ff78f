"""Perplexity against size, one function per figure; :mod:`usllm.reports.style` saves what they return."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from usllm.reports.axes import across, byte_axis, perplexity_axis, plain_number, rate_axis
from usllm.reports.labels import dense_perplexity, labels
from usllm.reports.legend import FRONT, point_legend
from usllm.reports.runs import Run, TestText
from usllm.reports.style import (
    DENSE_COLOUR,
    OTHER_MARKER,
    PAPER,
    ROW_MARKERS,
    SOFT,
    allocation_colour,
    new_figure,
    shortened,
    spread,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Reference:
    """Another way to make the model small, to compare with.

    Attributes:
        name: As it is written beside its line.
        perplexity: By test text.
        bytes: Of the model.
    """

    name: str = "4-bit"
    perplexity: Mapping[TestText, float] = field(default_factory=dict)
    bytes: int | None = None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates (lower is better), by the first coordinate."""
    front: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((size, loss))
    return front


@styled
def perplexity_by_rate(
    runs: Sequence[Run], text: TestText, reference: Reference | None = None, title: str | None = None
) -> Figure:
    """Perplexity after finetuning against bits per compressed weight, both axes logarithmic.

    Colours are allocation rules, markers rows of the sketch; lines give the dense model, as it was and finetuned alike,
    the Pareto front, and the reference.

    Args:
        runs: Runs that began with the same dense model.
        text: What was measured.
        reference: Another compressed model.
        title: Title; that of ``text`` by default.
    """
    figure, (axes,) = new_figure(6.2, 4.3)
    points = _draw_runs(axes, runs, text, lambda run: run.bits)
    _draw_front(axes, points)
    levels = _draw_levels(axes, runs, text, reference)
    rate_axis(axes, [rate for rate, _ in points])
    perplexity_axis(axes, [value for _, value in points] + [value for value, *_ in levels])
    _finish(figure, runs, text, title, "bits per compressed weight, achieved")
    _name_levels(axes, levels)
    return figure


@styled
def perplexity_by_bytes(
    runs: Sequence[Run], text: TestText, reference: Reference | None = None, title: str | None = None
) -> Figure:
    """Perplexity after finetuning against the bytes of the whole model, both axes logarithmic.

    As :func:`perplexity_by_rate`; the dense model in bf16 and the reference are points here, where their bytes are
    known.
    """
    figure, (axes,) = new_figure(6.2, 4.3)
    points = _draw_runs(axes, runs, text, lambda run: run.bytes)
    dense = dense_perplexity(runs, text)
    dense_bytes = next((run.dense_bytes for run in runs if run.dense_bytes), None)
    marked: list[tuple[float, float, str, str]] = []
    if dense_bytes and dense:
        marked.append((float(dense_bytes), dense, "dense model, bf16", DENSE_COLOUR))
        axes.plot([dense_bytes], [dense], marker="*", ms=13, color=DENSE_COLOUR, mec=PAPER, zorder=4)
    if reference is not None and reference.bytes and (value := reference.perplexity.get(text)):
        marked.append((float(reference.bytes), value, shortened(reference.name), SOFT))
        axes.plot([reference.bytes], [value], marker="X", ms=9, color=SOFT, mec=PAPER, zorder=4)
    _draw_front(axes, points)
    byte_axis(axes, [size for size, _ in points] + [size for size, *_ in marked])
    perplexity_axis(axes, [value for _, value in points] + [value for _, value, *_ in marked])
    _finish(figure, runs, text, title, "size of the model, with what is not compressed")
    for size, value, name, colour in marked:
        # Towards the middle of the panel, where there is room.
        right = across(axes, size) > 0.5
        axes.annotate(
            name,
            (size, value),
            (-8 if right else 8, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            color=colour,
            fontsize=8.5,
        )
    return figure


def _draw_runs(
    axes: Axes, runs: Sequence[Run], text: TestText, size: Callable[[Run], float | None]
) -> list[tuple[float, float]]:
    """The runs as points; returned are those that were drawn."""
    names, points = labels(runs), []
    for number, run in enumerate(runs):
        across, up = size(run), run.finetuned(text)
        if across is None or up is None:
            continue
        points.append((float(across), up))
        (artist,) = axes.plot(
            [across],
            [up],
            marker=ROW_MARKERS.get(run.rows or 1, OTHER_MARKER),
            # Points may coincide: more rows are larger and lie below.
            markersize=7.5 + 1.5 * (min(run.rows or 1, 4) - 1),
            linestyle="none",
            color=allocation_colour(run.allocation),
            markeredgecolor=PAPER,
            zorder=3 - 0.1 * min(run.rows or 1, 4),
        )
        artist.set_gid(f"point-{number}")
        artist.set_label(f"{names[run.name]}: {plain_number(round(up, 2))}, {run.name}")
    return points


def _draw_front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    front = pareto_front(points)
    if len(front) > 1:  # of one point there is nothing to join
        axes.step(*zip(*front, strict=True), where="post", color=SOFT, linewidth=1.1, zorder=2, alpha=0.75, label=FRONT)


def _draw_levels(
    axes: Axes, runs: Sequence[Run], text: TestText, reference: Reference | None
) -> list[tuple[float, str, str]]:
    """Horizontal lines; returned are their values, names and colours."""
    levels: list[tuple[float, str, str, Any]] = []
    if (dense := dense_perplexity(runs, text)) is not None:
        levels.append((dense, f"dense {plain_number(_three_digits(dense))}", DENSE_COLOUR, "solid"))
    alike = [value for run in runs if run.dense and (value := run.finetuned(text)) is not None]
    if alike:
        best = min(alike)
        levels.append((best, f"dense, finetuned {plain_number(_three_digits(best))}", DENSE_COLOUR, (0, (4, 2))))
    if reference is not None and (value := reference.perplexity.get(text)) is not None:
        levels.append(
            (value, f"{shortened(reference.name, 24)} {plain_number(_three_digits(value))}", SOFT, (0, (1.2, 1.6)))
        )
    for value, _, colour, style in levels:
        axes.axhline(value, color=colour, linewidth=1.3, linestyle=style, zorder=1)
    return [(value, name, colour) for value, name, colour, _ in levels]


def _name_levels(axes: Axes, levels: Sequence[tuple[float, str, str]]) -> None:
    """Write the lines' names right of the panel, moved apart where the lines are close."""
    levels = sorted(levels)
    low, high = (math.log(limit) for limit in axes.get_ylim())
    heights = [(math.log(value) - low) / (high - low) for value, _, _ in levels]
    for (value, name, colour), height in zip(levels, spread(heights, 0.055, 0.0, 1.0), strict=True):
        axes.annotate(
            name,
            (1, value),
            (1.02, height),
            xycoords=("axes fraction", "data"),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=8.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)},
        )


def _finish(figure: Figure, runs: Sequence[Run], text: TestText, title: str | None, label: str) -> None:
    (axes,) = figure.axes
    axes.set_title(title or str(text))
    axes.set_xlabel(label)
    axes.set_ylabel("perplexity after finetuning")
    axes.grid(True)
    drawn = [run for run in runs if run.finetuned(text) is not None and not run.dense]
    point_legend(figure, drawn, any(line.get_label() == FRONT for line in axes.lines))


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
