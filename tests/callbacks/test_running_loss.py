from __future__ import annotations

from pathlib import Path

import pytest

from usllm.callbacks.running_loss import SMOOTHING, RunningLoss, read_losses
from usllm.system.errors import UserError


def after(*losses: float) -> RunningLoss:
    running = RunningLoss()
    for step, loss in enumerate(losses, start=1):
        running.update(loss, step)
    return running


def test_mean_and_change_are_exponential_and_start_at_their_first_values() -> None:
    running = after(4.0, 2.0, 3.0)
    assert running.mean == pytest.approx(SMOOTHING * (SMOOTHING * 4 + (1 - SMOOTHING) * 2) + (1 - SMOOTHING) * 3)
    assert running.change == pytest.approx(SMOOTHING * 0.5 + (1 - SMOOTHING) * 0.5)


def test_change_does_not_depend_on_the_size_of_the_loss() -> None:
    assert after(4.0, 3.0, 3.5).change == pytest.approx(after(400.0, 300.0, 350.0).change)


def test_best_mean_remembers_its_step() -> None:
    running = after(3.0, 1.0, 9.0)
    assert running.best_step == 2
    assert running.best < running.mean


def test_state_rebuilds_the_statistics() -> None:
    running = after(3.0, 2.0)
    copy = RunningLoss(*running.state())
    for each in (running, copy):
        each.update(1.0, 3)
    assert copy.state() == running.state()


def test_losses_are_read_by_optimizer_step_and_rows_of_other_metrics_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss,val/loss\n0,0,3.5,\n0,0,,3.0\n0,9,2.5,\n")
    assert read_losses(path) == {1: 3.5, 10: 2.5}


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reference_losses=.*none\.csv: cannot be read"):
        read_losses(tmp_path / "none.csv")


def test_file_without_the_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n0,3.5\n")
    with pytest.raises(UserError, match="needs the columns step and train/loss"):
        read_losses(path)
