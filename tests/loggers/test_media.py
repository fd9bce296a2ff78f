"""Numbers go to every logger, tables and pictures to those that can show them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure

from usllm.loggers import (
    log_figure,
    log_histogram,
    log_scalars,
    log_table,
    takes_media,
)


class Recorder:
    """Stands for the object behind a logger; remembers every call."""

    id = "r1"

    def __init__(self) -> None:
        self.calls: dict[str, list[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.setdefault(name, []).append((args, kwargs))


class Board(TensorBoardLogger):
    """A TensorBoard logger without TensorBoard."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    @property
    def experiment(self) -> Any:
        return self.recorder


class Wandb(WandbLogger):
    """A W&B logger without a run."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._prefix = ""
        self._wandb_init: dict[str, Any] = {}

    @property
    def experiment(self) -> Any:
        return self.recorder


def test_csv_file_takes_numbers_and_nothing_else(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="csv")
    assert not takes_media([logger])
    log_scalars([logger], {"a": 1.5, "missing": None}, 3)
    log_table([logger], "t", ["x"], [[1]], 3)
    log_histogram([logger], "h", np.array([1]), np.array([0.0, 1.0]), 3)
    log_figure([logger], "f", Figure(), 3)
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1.5", "step": "3"}]


def test_board_gets_a_markdown_table_a_histogram_and_a_picture() -> None:
    board = Board()
    assert takes_media([board])
    log_table([board], "t", ["x", "y"], [["a|b\nc", 0.123456789]], 3)
    log_histogram([board], "h", np.array([1, 3]), np.array([0.0, 1.0, 2.0]), 3)
    log_figure([board], "f", Figure(), 3)
    calls = board.recorder.calls
    assert calls["add_text"] == [(("t", "| x | y |\n| --- | --- |\n| a\\|b<br>c | 0.12346 |", 3), {})]
    ((_, histogram),) = calls["add_histogram_raw"]
    assert (histogram["num"], histogram["sum"], histogram["global_step"]) == (4, 0.5 + 3 * 1.5, 3)
    assert calls["add_figure"][0][0][0] == "f"


def test_wandb_gets_its_own_kinds_of_media_at_the_trainers_step() -> None:
    logger = Wandb()
    log_table([logger], "t", ["x", "y"], [["a", 1.0], ["b", None]], 3)
    log_histogram([logger], "h", np.array([1, 3]), np.array([0.0, 1.0, 2.0]), 3)
    log_figure([logger], "f", Figure(figsize=(1, 1)), 3)
    logged = [args[0] for args, _ in logger.recorder.calls["log"]]
    assert [entry["trainer/global_step"] for entry in logged] == [3, 3, 3]
    assert logged[0]["t"].columns == ["x", "y"]
    assert logged[0]["t"].data == [["a", 1.0], ["b", None]]
    assert list(logged[1]["h"].histogram) == [1, 3]
    assert type(logged[2]["f"][0]).__name__ == "Image"
