"""Experiment trackers that survive a kill (a CSV file, Weights & Biases), and one way to log tables and pictures."""

from __future__ import annotations

from usllm.loggers.artifacts import log_export, logs_exports, reopened
from usllm.loggers.csv_run import CsvRunLogger
from usllm.loggers.media import axis_step, log_figure, log_histogram, log_scalars, log_table, takes_media
from usllm.loggers.wandb_run import WANDB_ID_FILE, WandbRunLogger

__all__ = [
    "WANDB_ID_FILE",
    "CsvRunLogger",
    "WandbRunLogger",
    "axis_step",
    "log_export",
    "log_figure",
    "log_histogram",
    "log_scalars",
    "log_table",
    "logs_exports",
    "reopened",
    "takes_media",
]
