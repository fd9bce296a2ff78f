"""No checkpoint without the metrics of its step."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, LightningModule, Trainer

from usllm.loggers import CsvRunLogger, axis_step


class LoggedSteps(Callback):
    """Has the row of a step in ``metrics.csv`` on the disk before the step's checkpoint is.

    Lightning saves a step first and logs it afterwards. A process that is killed between the two would be resumed
    behind the step, whose metrics nobody would ever log. The other way round a row may have no checkpoint: the resumed
    run drops it and makes the step again (:meth:`usllm.loggers.CsvRunLogger.continue_from`).
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Log what Lightning is about to log; the same values of the same step are one row."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, CsvRunLogger)]
        if not loggers:
            return
        connector = trainer._logger_connector
        metrics = connector.metrics["log"] if trainer.training and connector.should_update_logs else {}
        if metrics:
            row = {**convert_tensors_to_scalars(metrics), "epoch": trainer.current_epoch}
            for logger in loggers:
                logger.log_metrics(row, axis_step(trainer))
        for logger in loggers:
            logger.save(to_disk=True)
