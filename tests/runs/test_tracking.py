"""Trackers are closed whatever ends a run, and only one that was told to make room is queued again."""

from __future__ import annotations

import pytest

from usllm.callbacks import Preempted
from usllm.loggers import WandbRunLogger
from usllm.runs.tracking import finishing


class Tracker(WandbRunLogger):
    """Notes what W&B would be told."""

    def __init__(self) -> None:
        super().__init__(mode="disabled")
        self.told: list[str | int] = []

    def mark_preempting(self) -> None:
        self.told.append("preempting")

    def finish(self, exit_code: int = 0) -> None:
        self.told.append(exit_code)


@pytest.fixture
def tracker() -> Tracker:
    return Tracker()


def test_preempted_run_is_marked_before_it_is_closed(tracker: Tracker) -> None:
    with pytest.raises(Preempted), finishing([tracker]):
        raise Preempted(75)
    assert tracker.told == ["preempting", 75]


@pytest.mark.parametrize(
    ("leaving", "code"),
    [
        (SystemExit(143), 143),  # Lightning's answer to a SIGTERM that the configuration leaves to it
        (SystemExit("refused"), 1),
        (KeyboardInterrupt(), 1),
        (RuntimeError("out of memory"), 1),
    ],
)
def test_run_that_ends_otherwise_is_not_queued_again(tracker: Tracker, leaving: BaseException, code: int) -> None:
    with pytest.raises(type(leaving)), finishing([tracker]):
        raise leaving
    assert tracker.told == [code]


def test_finished_run_is_closed(tracker: Tracker) -> None:
    with finishing([tracker]):
        pass
    assert tracker.told == [0]
