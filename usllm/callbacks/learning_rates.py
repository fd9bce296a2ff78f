"""Logs the learning rate of every kind of parameters."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LearningRates(Callback):
    """Logs ``lr/latents``, ``lr/scales`` and ``lr/rest`` after every optimizer step, as the step used them.

    Rates that are relative to the size of each tensor are logged as they were asked for, in units of that size: one
    number for all layers. Kinds with equal settings share a group of the optimizer, and are logged by its first kind.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Take them before the schedule moves on."""
        if not trainer.loggers:
            return
        rates: dict[str, float] = {}
        for group in optimizer.param_groups:
            rates.setdefault(f"lr/{group.get('kind', 'rest')}", group["lr"] / group.get("size", 1.0))
        pl_module.log_dict(rates)
