"""Whatever moment a run is killed at, no checkpointed step lacks its row of metrics; resumed it has one for each."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from commands import Outcome, command, killed_after

from usllm.system.metric_rows import part_folders, read_rows
from usllm.training import latest_checkpoint, load_checkpoint

STEPS = 8


def train(text: Path, run_dir: Path, *more: str, before: Callable[[], None] | None = None) -> Outcome:
    """A run of eight steps with a checkpoint at every second one."""
    options = [f"data.train.path={text}", f"run_dir={run_dir}", "~callbacks.progress", "evaluation.max_windows=1"]
    every = "callbacks.checkpoint.every_n_train_steps=2"
    return command("train", "experiment=tiny", *options, every, *more, folder=run_dir.parent, before=before)


def losses(run_dir: Path) -> dict[int, str]:
    """Training loss by finished steps, as it is written; one row for each step that has any."""
    parts = [folder / "metrics.csv" for folder in part_folders(run_dir)]
    rows = [row for path in parts if path.exists() for row in read_rows(path)]  # killed before a first row: no file yet
    steps = [int(row["step"]) + 1 for row in rows]
    assert len(steps) == len(set(steps)), f"steps of several rows: {steps}"
    return {step: row["train/loss"] for step, row in zip(steps, rows, strict=True) if row.get("train/loss")}


def checkpointed_step(run_dir: Path) -> int:
    """Step that a resumed run goes on from."""
    newest = latest_checkpoint(run_dir / "checkpoints")
    return 0 if newest is None else int(load_checkpoint(newest)["global_step"])


@pytest.fixture(scope="module")
def untouched(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Losses of the run that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("untouched") / "run"
    done = train(tiny_text, run_dir)
    assert done.status == 0, done.output
    return losses(run_dir)


def test_run_has_one_row_for_each_step(untouched: dict[int, str]) -> None:
    assert list(untouched) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("calls", [1, 2])
def test_kill_between_checkpoint_and_log_loses_no_step(
    calls: int, untouched: dict[int, str], tiny_text: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    killer = killed_after("usllm.training.checkpoints", "AtomicCheckpointIO.save_checkpoint", calls)
    killed = train(tiny_text, run_dir, before=killer)
    assert killed.status == -signal.SIGKILL, killed.output
    assert checkpointed_step(run_dir) == 2 * calls
    assert losses(run_dir) == {step: untouched[step] for step in range(1, 2 * calls + 1)}
    resumed = train(tiny_text, run_dir, "resume=true")
    assert resumed.status == 0, resumed.output
    assert losses(run_dir) == untouched


def test_rows_behind_the_checkpoint_are_made_again(untouched: dict[int, str], tiny_text: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    killer = ["+callbacks.killer._target_=killing.KillAt", "+callbacks.killer.step=6"]
    killed = train(tiny_text, run_dir, *killer, "callbacks.checkpoint.every_n_train_steps=3")
    assert killed.status == -signal.SIGKILL, killed.output
    assert (checkpointed_step(run_dir), max(losses(run_dir))) == (3, 5)
    resumed = train(tiny_text, run_dir, "resume=true", "callbacks.checkpoint.every_n_train_steps=3")
    assert resumed.status == 0, resumed.output
    assert losses(run_dir) == untouched


class KilledAtCall:
    """Kills the process at a call of any function, of Python's or of a library's, counted from the first step on.

    Args:
        calls: At which; 0 never, and their number is left in ``file``.
    """

    def __init__(self, calls: int, file: Path) -> None:
        self.calls, self.file = calls, file

    def __call__(self) -> None:
        from usllm.training import StepCheckpoint

        begin, end, made = StepCheckpoint.on_train_start, StepCheckpoint.on_train_end, [0]

        def count(frame: FrameType, event: str, argument: Any) -> None:
            made[0] += event in ("call", "c_call", "c_return")
            if self.calls and made[0] == self.calls:
                os.kill(os.getpid(), signal.SIGKILL)

        def begun(*arguments: Any) -> None:
            begin(*arguments)
            sys.setprofile(count)

        def ended(*arguments: Any) -> None:
            end(*arguments)
            sys.setprofile(None)
            self.file.write_text(str(made[0]))

        StepCheckpoint.on_train_start, StepCheckpoint.on_train_end = begun, ended  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def calls(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Calls that training makes from its first step to its last checkpoint."""
    folder = tmp_path_factory.mktemp("counted")
    done = train(tiny_text, folder / "run", before=KilledAtCall(0, folder / "calls"))
    assert done.status == 0, done.output
    return int((folder / "calls").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_kill_at_any_moment_loses_no_step(
    seed: int, calls: int, untouched: dict[int, str], tiny_text: Path, tmp_path: Path
) -> None:
    draw, run_dir = random.Random(seed), tmp_path / "run"
    for _ in range(1 + seed % 2):  # killed once, or again after it was resumed
        moment = KilledAtCall(draw.randint(1, calls), tmp_path / "calls")
        outcome = train(tiny_text, run_dir, "resume=true", before=moment)
        assert outcome.status in (0, -signal.SIGKILL), outcome.output
        saved, logged = checkpointed_step(run_dir), losses(run_dir)
        assert all(logged.get(step) == untouched[step] for step in range(1, saved + 1)), (saved, logged)
    resumed = train(tiny_text, run_dir, "resume=true")
    assert resumed.status == 0, resumed.output
    assert losses(run_dir) == untouched
