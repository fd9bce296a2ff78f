"""A process that leaves takes along the ranks that it has started, and outlives them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from usllm.runs.launched import ending_together


@pytest.fixture
def waiting() -> Iterator[subprocess.Popen[bytes]]:
    """A rank that waits for ever, and takes no notice of SIGTERM."""
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def trainer_of(*processes: Any) -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=list(processes))))


@pytest.mark.parametrize("leaving", [SystemExit(75), RuntimeError("disk full")])
def test_rank_that_waits_is_killed_and_not_watched_any_more(
    leaving: BaseException, waiting: subprocess.Popen[bytes]
) -> None:
    trainer = trainer_of(waiting)
    watched = trainer.strategy.launcher.procs
    with pytest.raises(type(leaving)), ending_together(trainer, patience=0):
        raise leaving
    assert waiting.wait() == -signal.SIGKILL
    assert watched == []


def test_rank_that_ends_by_itself_is_waited_for() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        assert other.stdin is not None
        other.stdin.close()
        with pytest.raises(RuntimeError), ending_together(trainer_of(other)):
            raise RuntimeError
        assert other.returncode == 0


def test_finished_run_leaves_the_others_alone(waiting: subprocess.Popen[bytes]) -> None:
    trainer = trainer_of(waiting)
    with ending_together(trainer, patience=0):
        pass
    assert waiting.poll() is None
    assert trainer.strategy.launcher.procs == [waiting]


def test_run_without_a_launcher_ends_as_it_would() -> None:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=None))
    with pytest.raises(KeyError), ending_together(trainer):
        raise KeyError
