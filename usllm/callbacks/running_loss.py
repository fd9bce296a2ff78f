"""Running statistics of a training loss, and the losses of a reference run to hold them against."""

from __future__ import annotations

import math
from pathlib import Path

from usllm.system.errors import UserError
from usllm.system.metric_rows import read_rows

SMOOTHING = 0.9
"""Weight of the past in the running means of the loss and of its step-to-step changes."""


class RunningLoss:
    """Running means of a loss and of its relative change from one step to the next, and its best value.

    Attributes:
        mean: exponential running mean of the loss, nats.
        change: exponential running mean of ``|loss - previous| / previous``.
        best, best_step: lowest running mean, and the step that had it.
        steps: losses seen.
    """

    def __init__(
        self,
        mean: float = 0.0,
        change: float = 0.0,
        best: float = math.inf,
        best_step: int = 0,
        last: float = 0.0,
        steps: int = 0,
    ) -> None:
        self.mean, self.change, self.best, self.best_step = mean, change, best, best_step
        self.last, self.steps = last, steps

    def state(self) -> list[float | int]:
        """Arguments that rebuild the object."""
        return [self.mean, self.change, self.best, self.best_step, self.last, self.steps]

    def update(self, loss: float, step: int) -> None:
        """Take in the loss of one optimizer step."""
        if self.steps:
            change = abs(loss - self.last) / max(abs(self.last), 1e-12)
            self.change = change if self.steps == 1 else SMOOTHING * self.change + (1 - SMOOTHING) * change
            self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * loss
        else:
            self.mean = loss
        self.last = loss
        self.steps += 1
        if self.mean < self.best:
            self.best, self.best_step = self.mean, step


def read_losses(path: str | Path) -> dict[int, float]:
    """Loss by optimizer step, from a CSV with columns ``step`` and ``train/loss``; rows without a loss, or cut
    off by a kill, are skipped.

    Lightning's ``metrics.csv`` counts finished steps from 0, so its row ``step`` is the optimizer step ``step + 1``.

    Raises:
        UserError: the file is missing or lacks these columns.
    """
    key = f"callbacks.sketch_health.reference_losses={path}"
    try:
        rows = read_rows(Path(path))
    except OSError as error:
        raise UserError(f"{key}: cannot be read ({error.strerror})") from error
    if not rows or not {"step", "train/loss"} <= rows[0].keys():
        raise UserError(f"{key}: needs the columns step and train/loss, as in metrics.csv of a dense run")
    return {int(row["step"]) + 1: float(row["train/loss"]) for row in rows if row["train/loss"]}
