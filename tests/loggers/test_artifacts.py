"""Whether an export is logged is the run's to say; the real thing is tried in ``tests/cli/test_wandb.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from usllm.loggers import log_export, logs_exports, reopened

ASKED = {"logger": {"wandb": {"_target_": "usllm.loggers.WandbRunLogger", "log_export": True, "mode": "disabled"}}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ASKED, True),
        ({"logger": {"wandb": {"log_export": False}}}, False),
        ({"logger": {"wandb": {"log_model": True}}}, False),  # of a run that began before there was such a key
        ({"logger": {"csv": {}}}, False),
        ({"logger": None}, False),
        ({}, False),
    ],
)
def test_export_is_logged_where_the_run_asked_for_it(config: dict[str, Any], expected: bool) -> None:
    assert logs_exports(config) is expected


def test_disabled_run_logs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("a run was begun"))
    assert log_export(reopened(ASKED, tmp_path), tmp_path, {}) is None
    assert not list(tmp_path.iterdir())
