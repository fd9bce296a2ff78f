"""A run's time is that of all its calls, as far as they have kept it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Timer

from usllm.runs.time_spent import seconds_in_blocks, seconds_spent


def test_blocks_of_earlier_calls_are_counted(tmp_path: Path) -> None:
    assert seconds_in_blocks(tmp_path) == 0.0
    for stage, rows in {"reconstruct": [{"seconds": 2.5}, {"seconds": 4.0}], "allocate": [{"bits": 1}]}.items():
        (tmp_path / "stages" / stage).mkdir(parents=True)
        (tmp_path / "stages" / stage / "found.json").write_text(json.dumps({"rows": rows}))
    assert seconds_in_blocks(tmp_path) == 6.5


def test_training_before_a_checkpoint_is_counted_once() -> None:
    timer = Timer()
    timer.load_state_dict({"time_elapsed": {"train": 100.0, "sanity_check": 0.0, "validate": 0.0, "test": 0.0}})
    found = seconds_spent(timer, invocation=30.0, earlier=7.0, continued=True)
    assert found == {"training": 100.0, "total": pytest.approx(137.0), "continued": True}
