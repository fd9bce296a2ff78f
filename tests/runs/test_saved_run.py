"""What is read from a checkpoint: the configuration of its run, as it is meant on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from usllm.runs.saved_run import find_checkpoint, stored_config
from usllm.system.errors import UserError


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


def test_folder_above_runs_is_answered_with_the_newest_of_them(tmp_path: Path) -> None:
    for name, step, second in (("a/one", 2, 50), ("a/one", 9, 10), ("a/two", 4, 40), ("b", 1, 30)):
        file = tmp_path / name / "checkpoints" / f"step={step}.ckpt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (second, second))
    with pytest.raises(UserError, match=rf"give ckpt={tmp_path}/a/one, or another of the 3 runs in it"):
        find_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match=rf"give ckpt={tmp_path}/a/one, or another of the 2 runs in it"):
        find_checkpoint(str(tmp_path / "a"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="give the directory of a run"):
        find_checkpoint(str(tmp_path / "nothing"))
