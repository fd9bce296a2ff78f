"""Metrics over the steps of a run, read from the CSV files that its logger wrote, also while it is still writing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from usllm.system.metric_rows import METRICS_FILE, Row, part_folders, read_rows

# What the logger adds to every row, and what belongs to the machinery rather than to the run.
_NOT_METRICS = ("step", "epoch")


@dataclass(frozen=True)
class Curve:
    """One metric.

    Attributes:
        steps: Optimizer steps made when the value was logged, rising, from 1.
        values: The values, finite or not.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def smoothed(self, steps: int) -> Curve:
        """The trailing mean over ``steps`` logged values; the first ones average what there is."""
        totals, means = [0.0], []
        for value in self.values:
            totals.append(totals[-1] + value)
            count = min(steps, len(totals) - 1)
            means.append((totals[-1] - totals[-1 - count]) / count)
        return Curve(self.steps, tuple(means))

    def thinned(self, points: int) -> Curve:
        """At most ``points`` of the points, evenly spread, the last one among them."""
        every = -(-len(self.steps) // points)
        first = (len(self.steps) - 1) % every if every else 0
        return Curve(self.steps[first::every], self.values[first::every]) if every > 1 else self

    def finite(self) -> Curve:
        """The points that can be drawn."""
        kept = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
        return Curve(tuple(step for step, _ in kept), tuple(value for _, value in kept))


def read_curves(run_dir: Path) -> dict[str, Curve]:
    """All metrics in ``csv/version_*/metrics.csv``, of which runs of older versions have one for each restart.

    Of a step that was logged twice, the later value counts: a resumed run repeats the steps after its checkpoint.
    A row that is cut off, because the run is being written or was killed, is left out.
    """
    points: dict[str, dict[int, float]] = {}
    for folder in part_folders(run_dir):
        for row in _rows(folder / METRICS_FILE):
            add_points(points, row, row.get("step"))
    return curves_of(points)


def add_points(points: dict[str, dict[int, float]], row: Mapping[str, object], step: object) -> None:
    """Add one logged row, values by metric, to ``points`` (by metric, then by step)."""
    number = _number(step)
    if number is None or not math.isfinite(number):
        return
    for metric, value in row.items():
        if metric not in _NOT_METRICS and (figure := _number(value)) is not None:
            points.setdefault(metric, {})[int(number) + 1] = figure


def curves_of(points: Mapping[str, Mapping[int, float]]) -> dict[str, Curve]:
    """Curves by metric, from points by metric and step."""
    return {
        metric: Curve(tuple(sorted(values)), tuple(values[step] for step in sorted(values)))
        for metric, values in points.items()
    }


def _rows(path: Path) -> Iterable[Row]:
    try:
        return read_rows(path)
    except OSError:
        return []


def _number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
