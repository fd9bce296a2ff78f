"""Entries of the cache appear whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from usllm.system import cache
from usllm.system.cache import cache_root, published


def _write(folder: Path) -> None:
    (folder / "a").write_text("1" * 1000)


def _publish(folder: Path, barrier: object, calls: Path) -> None:
    def build(scratch: Path) -> None:
        (calls / str(os.getpid())).touch()
        _write(scratch)

    barrier.wait(30)  # type: ignore[attr-defined]
    published(folder, build)


def test_entry_is_built_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        _write(folder)

    first = published(tmp_path / "x" / "entry", build)
    second = published(tmp_path / "x" / "entry", build)
    assert first == second
    assert len(calls) == 1
    assert (first / "a").read_text() == "1" * 1000


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        _write(folder)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        published(tmp_path / "entry", build)
    assert list(tmp_path.iterdir()) == []


def test_loser_of_a_race_takes_the_winners_entry(tmp_path: Path) -> None:
    entry = tmp_path / "entry"

    def build(folder: Path) -> None:
        entry.mkdir()  # another process, on a machine that shares no locks with this one, finishes in the meantime
        _write(entry)
        (folder / "a").write_text("loser")

    assert (published(entry, build) / "a").read_text() == "1" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_of_concurrent_processes_one_builds_and_the_others_wait(tmp_path: Path) -> None:
    folder, calls = tmp_path / "cache", tmp_path / "calls"
    calls.mkdir()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_publish, args=(folder / "entry", barrier, calls)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [path.name for path in folder.iterdir()] == ["entry"]
    assert (folder / "entry" / "a").read_text() == "1" * 1000
    assert len(list(calls.iterdir())) == 1


def test_lock_of_a_builder_that_was_killed_is_free(tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=published, args=(tmp_path / "entry", killed))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert (published(tmp_path / "entry", _write) / "a").read_text() == "1" * 1000


def test_lock_of_a_killed_builder_is_free_although_its_workers_live_on(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work() -> None:
        theirs.send(os.getpid())
        threading.Event().wait()

    def killed(folder: Path) -> None:
        worker = context.Process(target=work)
        worker.start()
        worker.join()

    child = context.Process(target=published, args=(tmp_path / "entry", killed))
    child.start()
    worker = ours.recv()
    try:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)  # not join, which waits for the worker too
        with (tmp_path / ".entry.lock").open() as file:
            cache.fcntl.flock(file, cache.fcntl.LOCK_EX | cache.fcntl.LOCK_NB)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_file_system_without_locks_still_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    assert (published(tmp_path / "entry", _write) / "a").read_text() == "1" * 1000


def test_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
