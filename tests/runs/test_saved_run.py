"""What is read from a checkpoint: the configuration of its run, as it is meant on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from usllm.runs.saved_run import stored_config


def saved(cache_dir: Path) -> dict[str, Any]:
    return {"usllm": {"config": {"data": {"cache_dir": str(cache_dir)}}}}


def test_cache_of_another_machine_is_neither_used_nor_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "here"))
    gone = tmp_path / "gone"
    assert stored_config(saved(gone), tmp_path)["data"]["cache_dir"] == str(tmp_path / "here")
    assert not gone.exists()


def test_cache_of_a_run_is_used_while_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "here"))
    of_run = tmp_path / "of_run"
    of_run.mkdir()
    assert stored_config(saved(of_run), tmp_path)["data"]["cache_dir"] == str(of_run)
