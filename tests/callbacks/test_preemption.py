"""A run that is told to leave finishes its step, saves, and continues elsewhere as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import Killed, Send, Settings, differences, final_checkpoint, record

from usllm.callbacks import Preempted, Preemption
from usllm.callbacks.preemption import Interrupted
from usllm.system.errors import UserError
from usllm.training import latest_checkpoint

# 6 steps of 2 micro batches, a checkpoint every 4 steps, validation after micro batches 4, 8 and 12.
SETTINGS = Settings(checkpoint_every=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run that was never told to leave."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    tiny_run.run(folder, SETTINGS)
    return folder


def preempted(folder: Path, send: Send, callback: Preemption | None = None) -> Preempted:
    """Run until the signal ends it."""
    callback = callback or Preemption()
    with pytest.raises(Preempted) as ended, callback.armed():
        tiny_run.run(folder, SETTINGS, callback, send)
    return ended.value


def saved_step(folder: Path) -> int:
    path = latest_checkpoint(folder / "checkpoints")
    return 0 if path is None else int(torch.load(path, weights_only=True)["global_step"])


MOMENTS = {
    "inside-accumulation": (("on_train_batch_start", 3), 2),
    "in-the-backward-pass": (("on_after_backward", 6), 3),
    "on-a-step-with-validation": (("on_before_optimizer_step", 4), 4),
    "in-a-validation": (("on_validation_batch_start", 1), 2),
    "while-saving": (("on_save_checkpoint", 1), 5),
    "on-the-last-step": (("on_before_optimizer_step", 6), 6),
}


@pytest.mark.parametrize(("moment", "step"), MOMENTS.values(), ids=MOMENTS)
def test_step_is_finished_and_saved_and_the_resumed_run_is_equal(
    moment: tuple[str, int], step: int, whole: Path, tmp_path: Path
) -> None:
    ended = preempted(tmp_path / "run", Send(*moment))
    assert ended.code == 75
    assert saved_step(tmp_path / "run") == step
    tiny_run.run(tmp_path / "run", SETTINGS)
    assert record(tmp_path / "run") == record(whole)
    assert not differences(final_checkpoint(whole), final_checkpoint(tmp_path / "run"))


@pytest.mark.parametrize("step", [3, 6], ids=["on-a-step-between", "on-the-last-step"])
def test_ranks_leave_together_behind_the_step_in_which_one_of_them_got_the_signal(step: int, tmp_path: Path) -> None:
    moment = ("on_before_optimizer_step", step)
    settings = replace(SETTINGS, ranks=2, batch_size=1, strategy="ddp", terminate_last_rank_at=moment)
    assert tiny_run.run_on_ranks(tmp_path / "run", settings) == [75, 75]
    assert saved_step(tmp_path / "run") == step


def test_after_an_error_in_training_a_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    callback = Preemption()
    with callback.armed():
        with pytest.raises(Killed):
            tiny_run.run(tmp_path / "run", replace(SETTINGS, kill_at=("on_train_batch_start", 3)), callback)
        with pytest.raises(Preempted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_before_the_first_step_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    preempted(tmp_path / "run", Send("on_fit_start", 1))
    assert saved_step(tmp_path / "run") == 0
    assert not (tmp_path / "run" / "record.jsonl").exists()


@pytest.mark.parametrize(("times", "step", "reason"), [(1, 3, "after step 3, which is saved"), (2, 0, "interrupted;")])
def test_ctrl_c_saves_the_step_and_a_second_one_leaves_at_once(
    times: int, step: int, reason: str, tmp_path: Path
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of tests may ignore it
    callback, pressed = Preemption(), [Send("on_after_backward", 6, signal.SIGINT) for _ in range(times)]
    try:
        with pytest.raises(Interrupted) as ended, callback.armed():
            tiny_run.run(tmp_path / "run", SETTINGS, callback, *pressed)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert reason in ended.value.reason
    assert "resume=true" in ended.value.reason
    assert saved_step(tmp_path / "run") == step


def test_ctrl_c_that_somebody_else_handles_is_left_to_them() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Preemption().armed():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_exit_code_and_reason_are_the_users(tmp_path: Path) -> None:
    ended = preempted(tmp_path / "run", Send("on_fit_start", 1, signal.SIGUSR1), Preemption(exit_code=99))
    assert ended.code == 99
    assert "SIGUSR1" in ended.reason
    assert "resume=true" in ended.reason


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Preemption().armed():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_handler_that_was_there_is_called_when_the_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As submitit's: it resubmits the job and ends the process.
    steps = []

    def resubmit(number: int, frame: Any) -> None:
        steps.append(saved_step(tmp_path / "run"))
        raise SystemExit(144)

    earlier = signal.signal(signal.SIGUSR2, resubmit)
    try:
        with pytest.raises(SystemExit, match="144"), (callback := Preemption()).armed():
            tiny_run.run(tmp_path / "run", SETTINGS, callback, Send("on_after_backward", 2, signal.SIGUSR2))
    finally:
        signal.signal(signal.SIGUSR2, earlier)
    assert steps == [1]


@pytest.mark.parametrize(
    ("number", "environment", "expected"),
    [
        (signal.SIGUSR1, {"SLURM_JOB_ID": "7"}, [["scontrol", "requeue", "7"]]),
        (
            signal.SIGUSR1,
            {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"},
            [["scontrol", "requeue", "7_2"]],
        ),
        (signal.SIGTERM, {"SLURM_JOB_ID": "7"}, []),  # cancelled, perhaps
        (signal.SIGUSR1, {"SLURM_JOB_ID": "7", "SUBMITIT_EXECUTOR": "slurm"}, []),
        (signal.SIGUSR1, {}, []),
    ],
)
def test_slurm_is_asked_to_requeue_on_its_warning_signal_only(
    number: signal.Signals, environment: dict[str, str], expected: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Preempted), Preemption().armed():
        os.kill(os.getpid(), number)
    assert asked == expected


@pytest.mark.parametrize(("arguments", "named"), [({"exit_code": 0}, "exit_code=0"), ({"signals": ["SIGX"]}, "SIGX")])
def test_unusable_arguments_are_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Preemption(**arguments)
