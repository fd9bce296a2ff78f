"""The CSV file of a run: a killed and resumed run has one, with one row for each step."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from usllm.system.files import write_text
from usllm.system.metric_rows import METRICS_FILE, MetricRows, part_folders

HYPERPARAMETERS_FILE = "hparams.yaml"


class CsvRunLogger(Logger):
    """Metrics in ``<save_dir>/csv/version_0/metrics.csv``, and the configuration in ``hparams.yaml`` beside it.

    Lightning's ``CSVLogger`` begins another file with each resume, repeats steps in it, and lacks the step of a
    checkpoint whose process is killed before the step is logged. Here all that is logged of a step is one row.

    Args:
        save_dir: directory of the run.
    """

    def __init__(self, save_dir: str = ".") -> None:
        super().__init__()
        self._run_dir = Path(save_dir)
        self._folder = self._run_dir / "csv" / "version_0"  # the name that Lightning's logger gives to the first part
        self._rows = MetricRows(self._folder / METRICS_FILE)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return "csv"

    @property
    def version(self) -> int:
        """Number of the part; there is one."""
        return 0

    @property
    def save_dir(self) -> str:
        """Directory of the run."""
        return str(self._run_dir)

    @property
    def log_dir(self) -> str:
        """Where the files are."""
        return str(self._folder)

    @rank_zero_only
    def continue_from(self, step: int) -> None:
        """Keep the rows of the first ``step`` optimizer steps alone: the run makes the others again.

        Rows that older versions of usllm have kept in further parts move into the one file.

        Args:
            step: finished optimizer steps of the checkpoint that the run goes on from; 0 for a fresh run.
        """
        others = [folder for folder in part_folders(self._run_dir) if folder != self._folder]
        self._rows.keep_below(step, [folder / METRICS_FILE for folder in others])
        for folder in others:
            (folder / HYPERPARAMETERS_FILE).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add numbers to the row of a step; rows before it are written."""
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self._rows.add(step or 0, values)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write the configuration."""
        plain = vars(params) if isinstance(params, Namespace) else params
        readable = json.loads(json.dumps(plain, default=str))
        write_text(self._folder / HYPERPARAMETERS_FILE, yaml.safe_dump(readable, sort_keys=False))

    @rank_zero_only
    def save(self, to_disk: bool = False) -> None:
        """Write what was added; with ``to_disk`` it is on the disk afterwards, whatever happens to the machine."""
        self._rows.save(to_disk)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what was added."""
        self.save()
