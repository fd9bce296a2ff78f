"""A run's directory has one user at a time, and a dead one does not count."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from usllm.system.errors import RunError, UserError
from usllm.system.lock import LOCK_FILE, sole_user


def hold(folder: Path, held: Any) -> None:
    with sole_user(folder):
        held.set()
        threading.Event().wait()


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A process that holds the directory ``run``."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", held))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join(60)


def test_second_user_is_refused_and_told_who_holds_it(tmp_path: Path, holder: Any) -> None:
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on {socket.gethostname()}"):
        sole_user(tmp_path / "run").__enter__()


def test_killed_user_frees_the_directory(tmp_path: Path, holder: Any) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    with sole_user(tmp_path / "run"):
        pass


def hold_with_a_worker(folder: Path, worker_pid: Any) -> None:
    with sole_user(folder):
        worker = multiprocessing.get_context("fork").Process(target=work, args=(worker_pid,))
        worker.start()
        worker.join()


def work(worker_pid: Any) -> None:
    worker_pid.send(os.getpid())
    threading.Event().wait()


def test_killed_user_frees_the_directory_although_its_workers_live_on(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold_with_a_worker, args=(tmp_path / "run", theirs))
    process.start()
    worker = ours.recv()
    try:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        os.waitpid(process.pid, 0)  # not join, which waits for the worker too
        os.kill(worker, 0)  # it is there
        with sole_user(tmp_path / "run"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_worker_does_not_free_the_directory_of_a_living_user(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=int)
    with sole_user(tmp_path / "mine"):
        worker.start()
        worker.join(60)
        with pytest.raises(UserError, match="in use"):
            sole_user(tmp_path / "mine").__enter__()


def test_same_process_may_use_it_again_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), sole_user(tmp_path):
            raise ZeroDivisionError
    assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


def test_other_ranks_of_a_distributed_run_are_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    with sole_user(tmp_path):
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        with sole_user(tmp_path):
            pass


def test_file_system_without_locks_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from usllm.system import lock

    def no_locks(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with sole_user(tmp_path):
        pass


@pytest.mark.parametrize(
    ("error", "before", "left"), [(UserError, False, False), (RunError, False, True), (UserError, True, True)]
)
def test_a_new_run_whose_input_is_refused_has_not_begun(
    error: type[UserError], before: bool, left: bool, tmp_path: Path
) -> None:
    if before:
        with sole_user(tmp_path):
            pass
    with pytest.raises(error), sole_user(tmp_path):
        raise error("data.train: wrong")
    assert (tmp_path / LOCK_FILE).is_file() == left
