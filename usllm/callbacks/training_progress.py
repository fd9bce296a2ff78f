"""How far training is: a bar on a terminal, lines where the output is a file."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from usllm.system.errors import UserError
from usllm.system.text import human_seconds


class TrainingProgress(RichProgressBar):
    """Lightning's bar; and where standard output is no terminal, such as in the log of a cluster's job, lines.

    A line has the step, the loss as it was logged last, and the time that is left at the pace of this process.

    Args:
        lines: How many in a whole run; 0: none.
        options: Passed on to Lightning's bar.

    Raises:
        UserError: ``lines`` is no whole number, or below 0.
    """

    def __init__(self, lines: int = 10, **options: Any) -> None:
        super().__init__(**options)
        if isinstance(lines, bool) or not isinstance(lines, int) or lines < 0:
            raise UserError(f"callbacks.progress.lines={lines}: must be a whole number, 0 or more")
        self._lines, self._step, self._began, self._first = lines, 0, 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time is counted from here."""
        super().on_train_start(trainer, pl_module)
        self._step = self._first = trainer.global_step
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A line where the step that this batch ended begins another part of the run."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step, before, steps = trainer.global_step, self._step, trainer.max_steps
        self._step = step
        if not self._lines or step == before or steps < 1 or sys.stdout.isatty() or not trainer.is_global_zero:
            return
        if step * self._lines // steps > before * self._lines // steps:
            loss = trainer.callback_metrics.get("train/loss")
            words = "" if loss is None else f", loss {float(loss):.3f}"
            left = (time.monotonic() - self._began) * (steps - step) / (step - self._first)
            ahead = f", {human_seconds(left)} left" if step < steps else ""
            print(f"step {step} of {steps}{words}{ahead}", flush=True)
