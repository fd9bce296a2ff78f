"""Entries of the cache appear whole or not at all."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from usllm.cache import cache_root, published


def _write(folder: Path) -> None:
    (folder / "a").write_text("1" * 1000)


def _publish(folder: Path, barrier: object) -> None:
    barrier.wait(30)  # type: ignore[attr-defined]
    published(folder, _write)


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
        published(entry, _write)  # another process finishes in the meantime
        (folder / "a").write_text("loser")

    assert (published(entry, build) / "a").read_text() == "1" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_concurrent_processes_leave_one_whole_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_publish, args=(tmp_path / "entry", barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    assert (tmp_path / "entry" / "a").read_text() == "1" * 1000


def test_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
