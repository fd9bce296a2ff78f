"""Losses over training, of all runs of a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from usllm.reports.curves import Curve
from usllm.reports.labels import labels
from usllm.reports.legend import line_legend
from usllm.reports.runs import Run
from usllm.reports.style import (
    DENSE_COLOUR,
    OTHER_DASHES,
    ROW_DASHES,
    allocation_colour,
    new_figure,
    shortened,
    spread,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING, VALIDATION = "train/loss", "val/loss"
NAMED = 14
"""Curves in one panel that are named at their ends; of more, the names would cover each other."""
POINTS = 500
"""Points of one curve; more than a screen shows would only make the page large."""
_WINDOW = 0.05  # of the steps: the running mean that is drawn


@styled
def training_curves(runs: Sequence[Run]) -> Figure | None:
    """Loss and validation loss over tokens, or over steps where a run's tokens are not known.

    Training losses of different objectives do not compare and have a panel each; the validation loss is the
    cross-entropy always. Training losses are running means over a twentieth of the steps.

    Returns:
        The figure; ``None`` where no run logged a loss.
    """
    panels: list[tuple[str, dict[str, Curve]]] = []
    for objective in dict.fromkeys(run.objective for run in runs):
        same = [run for run in runs if run.objective == objective]
        name = "" if objective is None else f", {objective.replace('_', ' ')}"
        panels.append((f"Training loss{name}", {run.name: _training(run) for run in same}))
    panels.append(("Validation loss, cross-entropy", {run.name: _curve(run, VALIDATION) for run in runs}))
    shown = [(title, kept) for title, curves in panels if (kept := {n: c for n, c in curves.items() if c.steps})]
    if not shown:
        return None
    by_tokens = all(run.tokens_per_step for run in runs if any(run.name in curves for _, curves in shown))
    figure, axes = new_figure(4.9 * len(shown) + 0.6, 4.0, 1, len(shown))
    names, found = labels(runs), {run.name: run for run in runs}
    for panel, (title, curves) in zip(axes, shown, strict=True):
        _draw(panel, {found[name]: curve for name, curve in curves.items()}, names, by_tokens)
        panel.set_title(title)
        panel.set_xlabel("tokens" if by_tokens else "steps")
        panel.set_ylabel("loss" if title.startswith("Training") and "entropy" not in title else "nats per token")
        panel.grid(True)
    if any(len(curves) > NAMED for _, curves in shown):
        line_legend(figure, [run for run in runs if any(run.name in curves for _, curves in shown)])
    return figure


def _draw(axes: Axes, curves: Mapping[Run, Curve], names: Mapping[str, str], by_tokens: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ends = []
    for number, (run, curve) in enumerate(curves.items()):
        unit = (run.tokens_per_step or 1.0) if by_tokens else 1.0
        colour = DENSE_COLOUR if run.dense else allocation_colour(run.allocation)
        (line,) = axes.plot(
            [step * unit for step in curve.steps],
            curve.values,
            color=colour,
            linestyle="solid" if run.dense else ROW_DASHES.get(run.rows or 1, OTHER_DASHES),
            marker="o" if len(curve.steps) < 12 else None,
            markersize=4.5,
            linewidth=1.4,
        )
        line.set_gid(f"curve-{axes.get_subplotspec().colspan.start}-{number}")  # type: ignore[union-attr]
        line.set_label(f"{names[run.name]}, {run.name} ({run.status})")
        ends.append((curve.steps[-1] * unit, curve.values[-1], shortened(names[run.name]), colour))
    values = [value for curve in curves.values() for value in curve.values]
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or 0.1
    axes.set_ylim(low - room, high + room)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))
    if len(ends) <= NAMED:
        _name_ends(axes, ends, low - room, high + room)


def _name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], bottom: float, top: float) -> None:
    """Write each curve's name at its end, right of the panel, moved apart so that no two names overlap."""
    height = (top - bottom) * 0.052
    order = sorted(range(len(ends)), key=lambda index: ends[index][1])
    places = spread([ends[index][1] for index in order], height, bottom + height / 2, top - height / 2)
    right = max(end[0] for end in ends)
    for index, place in zip(order, places, strict=True):
        across, up, name, colour = ends[index]
        axes.annotate(
            name,
            (across, up),
            (1.03, place),
            xycoords="data",
            textcoords=("axes fraction", "data"),
            color=colour,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.6,
                "alpha": 0.5,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )
    axes.set_xlim(0, right * 1.02)


def _training(run: Run) -> Curve:
    curve = _curve(run, TRAINING)
    return curve.smoothed(max(1, round(len(curve.steps) * _WINDOW))).thinned(POINTS)


def _curve(run: Run, metric: str) -> Curve:
    return run.curves[metric].finite() if metric in run.curves else Curve((), ())


def _thousands(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
