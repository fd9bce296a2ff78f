"""A run's time: of blocks and of training in all calls, of everything else in the last one."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import Timer

from usllm.runs.time_spent import seconds_in_blocks, seconds_spent


def test_seconds_of_a_window_are_counted_once_for_its_blocks() -> None:
    rows = [{"seconds": 2.5}, {"seconds": 2.5}, {"seconds": 4.0}, {"block": 3}, {"seconds": None}]
    assert seconds_in_blocks(rows) == 6.5
    assert seconds_in_blocks([]) == 0.0


def test_training_before_a_checkpoint_is_counted() -> None:
    timer = Timer()
    timer.load_state_dict({"time_elapsed": {"train": 100.0, "sanity_check": 0.0, "validate": 0.0, "test": 0.0}})
    timer._start_time["train"], timer._end_time["train"] = 5.0, 25.0  # type: ignore[index]
    found = seconds_spent(timer, invocation=30.0, continued=True)
    assert found == {"training": pytest.approx(120.0), "total": 30.0, "continued": True}
