"""The CSV logger keeps one file for a run, and beside it the configuration that reports read."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from usllm.loggers import CsvRunLogger
from usllm.system.metric_rows import read_rows


def test_configuration_is_read_back_whatever_is_in_it(tmp_path: Path) -> None:
    logger = CsvRunLogger(str(tmp_path))
    settings = {"name": "ä: [x] ${y}", "none": None, "rate": 1e-5, "path": Path("a/b"), "list": [1, 2.5]}
    logger.log_hyperparams(settings)
    kept = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text(encoding="utf-8"))
    assert kept == {**settings, "path": "a/b"}


def test_run_that_lightnings_logger_began_goes_on_in_one_file(tmp_path: Path) -> None:
    for values in ([5.0, 4.0, 3.0], [3.5, 2.0]):
        older = CSVLogger(tmp_path, name="csv")
        older.log_hyperparams({"a": 1})
        first = 0 if len(values) == 3 else 2
        for step, value in enumerate(values, first):
            older.log_metrics({"train/loss": value}, step)
            older.log_metrics({"lr": 0.1}, step)
        older.save()
    logger = CsvRunLogger(str(tmp_path))
    logger.continue_from(3)  # the checkpoint is of the third step; the fourth is made again
    logger.log_metrics({"train/loss": torch.tensor(1.5), "epoch": 0}, 3)
    logger.finalize("success")
    assert [folder.name for folder in (tmp_path / "csv").iterdir()] == ["version_0"]
    rows = read_rows(Path(logger.log_dir) / "metrics.csv")
    assert [(row["step"], row["train/loss"]) for row in rows] == [
        ("0", "5.0"),
        ("1", "4.0"),
        ("2", "3.5"),
        ("3", "1.5"),
    ]


def test_fresh_run_keeps_no_rows_of_another(tmp_path: Path) -> None:
    logger = CsvRunLogger(str(tmp_path))
    logger.log_metrics({"train/loss": 1.0}, 0)
    logger.save()
    again = CsvRunLogger(str(tmp_path))
    again.continue_from(0)
    assert not (Path(again.log_dir) / "metrics.csv").exists()
