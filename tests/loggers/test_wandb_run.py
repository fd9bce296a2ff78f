"""The run id: written before anything is sent, kept, and never taken from another run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from usllm.loggers import WANDB_ID_FILE, WandbRunLogger
from usllm.loggers.wandb_run import kept_id
from usllm.system.code_version import code_version
from usllm.system.errors import UserError
from usllm.training import StepCheckpoint


class FakeRun:
    """What the logger uses of W&B's run."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments, self.id = arguments, arguments["id"]
        self.config: dict[str, Any] = {}
        self.ended: int | None = None
        self.artifacts: list[tuple[Any, list[str]]] = []

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.artifacts.append((artifact, aliases))

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


@pytest.fixture(autouse=True)
def begun(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs that are begun; when each is, what its directory holds as its id is recorded."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    runs: list[FakeRun] = []

    class Config(dict[str, Any]):
        def update(self, values: Any, **_: Any) -> None:  # type: ignore[override]
            super().update(values)

    def init(**arguments: Any) -> FakeRun:
        path = Path(arguments["dir"]) / WANDB_ID_FILE
        runs.append(FakeRun({**arguments, "on_disk": path.read_text() if path.exists() else None}))
        runs[-1].config = Config()
        return runs[-1]

    monkeypatch.setattr(wandb, "init", init)
    return runs


def test_id_is_on_disk_before_the_run_begins_and_is_used_again(tmp_path: Path, begun: list[FakeRun]) -> None:
    for _ in range(2):
        logger = WandbRunLogger(save_dir=str(tmp_path), project="p", group="g", mode="offline")
        assert logger.experiment is begun[-1]
        logger.finish()
    assert begun[0].id == begun[1].id
    assert begun[0].arguments["on_disk"] == f"{begun[0].id}\n"
    assert begun[0].arguments["resume"] == "allow"
    assert begun[0].arguments["mode"] == "offline"
    assert begun[0].config["code"] == code_version()
    assert [run.ended for run in begun] == [0, 0]


def test_agent_chooses_the_id_and_a_directory_of_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "trial1")
    assert kept_id(tmp_path) == "trial1"
    monkeypatch.setenv("WANDB_RUN_ID", "trial2")
    with pytest.raises(UserError, match=r"belongs to the W&B run trial1.*oc\.env:WANDB_RUN_ID"):
        kept_id(tmp_path)
    monkeypatch.delenv("WANDB_RUN_ID")
    assert kept_id(tmp_path) == "trial1"


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_disabled_run_keeps_no_id(
    source: str, tmp_path: Path, begun: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = WandbRunLogger(save_dir=str(tmp_path), mode="disabled" if source == "argument" else None)
    assert logger.experiment is begun[-1]
    assert not (tmp_path / WANDB_ID_FILE).exists()


@pytest.mark.parametrize(("log_model", "names"), [(True, ["step=2.ckpt"]), ("all", ["step=1.ckpt", "step=2.ckpt"])])
def test_checkpoints_are_artifacts_when_asked_for_offline_too(
    log_model: bool | str, names: list[str], tmp_path: Path, begun: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    logger = WandbRunLogger(save_dir=str(tmp_path), mode="offline", log_model=log_model)
    _ = logger.experiment
    checkpoints = StepCheckpoint(str(tmp_path), every_n_train_steps=1)
    for step in (1, 2):
        path = tmp_path / f"step={step}.ckpt"
        path.write_text(str(step))
        checkpoints.best_k_models = {str(path): torch.tensor(step)}
        checkpoints.best_model_path = checkpoints.last_model_path = str(path)
        checkpoints.best_model_score = checkpoints.current_score = torch.tensor(step)
        logger.after_save_checkpoint(checkpoints)
    logger.finalize("success")
    logged = [artifact.metadata["original_filename"] for artifact, _ in begun[-1].artifacts]
    assert list(dict.fromkeys(logged)) == names


def test_unstarted_run_needs_no_finish(tmp_path: Path, begun: list[FakeRun]) -> None:
    logger = WandbRunLogger(save_dir=str(tmp_path), mode="offline")
    logger.mark_preempting()
    logger.finish()
    assert begun == []


def test_online_without_a_login_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("wandb.login", lambda prompt: False)
    with pytest.raises(UserError, match="wandb login"):
        WandbRunLogger(save_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"mode": "of"}, "mode=of"), ({"log_model": "x"}, "log_model=x"), ({"log_export": "all"}, "log_export=all")],
)
def test_unusable_arguments_are_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        WandbRunLogger(**arguments)


def test_code_version_of_a_checkout_names_the_commit() -> None:
    found = code_version()
    assert found["usllm"]
    if "commit" in found:
        assert len(found["commit"]) == 40
        assert isinstance(found["changed"], bool)
