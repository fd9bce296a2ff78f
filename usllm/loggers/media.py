"""Scalars to every logger; tables, histograms and pictures to those that can show them.

Weights & Biases and TensorBoard take all kinds. Others, such as the CSV file, take scalars only and are passed over.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BINS = 512  # of W&B's histograms


def axis_step(trainer: Trainer) -> int:
    """The step at which Lightning draws the metrics of the optimizer step that was just made: it counts from 0."""
    return max(trainer.global_step - 1, 0)


def takes_media(loggers: Iterable[Logger]) -> bool:
    """Whether one of the loggers shows more than scalars: what nobody would see need not be computed."""
    return any(_shows(logger) for logger in loggers)


def log_scalars(loggers: Iterable[Logger], values: Mapping[str, float | None], step: int) -> None:
    """Log numbers with every logger; those that are missing are left out."""
    present = {key: float(value) for key, value in values.items() if value is not None}
    if present:
        for logger in loggers:
            logger.log_metrics(present, step)


def log_table(
    loggers: Iterable[Logger], key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Log a table of numbers, texts and truth values."""
    for logger in filter(_shows, loggers):
        if isinstance(logger, WandbLogger):
            logger.log_table(key, list(columns), [list(row) for row in rows], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(key, _markdown(columns, rows), step)


def log_histogram(loggers: Iterable[Logger], key: str, counts: np.ndarray, edges: np.ndarray, step: int) -> None:
    """Log a histogram that is computed already.

    Args:
        counts: [bins], at most ``MAX_BINS``.
        edges: [bins + 1], rising.
    """
    for logger in filter(_shows, loggers):
        if isinstance(logger, WandbLogger):
            from wandb import Histogram

            histogram: Any = Histogram(np_histogram=(counts, edges))
            logger.log_metrics({key: histogram}, step)
        elif isinstance(logger, TensorBoardLogger):
            centres = (edges[1:] + edges[:-1]) / 2
            logger.experiment.add_histogram_raw(
                key,
                min=edges[0],
                max=edges[-1],
                num=counts.sum(),
                sum=(counts * centres).sum(),
                sum_squares=(counts * centres**2).sum(),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )


def log_figure(loggers: Iterable[Logger], key: str, figure: Figure, step: int) -> None:
    """Log a picture."""
    for logger in filter(_shows, loggers):
        if isinstance(logger, WandbLogger):
            from PIL import Image

            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110)
            buffer.seek(0)
            logger.log_image(key, [Image.open(buffer)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(key, figure, step, close=False)


def _shows(logger: Logger) -> bool:
    if isinstance(logger, WandbLogger):
        return not getattr(logger, "disabled", False)
    return isinstance(logger, TensorBoardLogger)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else str(value)
    return str(value).replace("|", "\\|").replace("\n", "<br>")
