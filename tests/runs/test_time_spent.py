"""Blocks of one window share the seconds that it took."""

from __future__ import annotations

from usllm.runs.time_spent import seconds_in_blocks


def test_seconds_of_a_window_are_counted_once_for_its_blocks() -> None:
    rows = [{"seconds": 2.5}, {"seconds": 2.5}, {"seconds": 4.0}, {"block": 3}, {"seconds": None}]
    assert seconds_in_blocks(rows) == 6.5
    assert seconds_in_blocks([]) == 0.0
