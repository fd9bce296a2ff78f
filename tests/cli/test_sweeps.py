"""``usllm-train -m``: stable directories, jobs that are skipped, resumed and refused, launchers and sweepers."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import CompactHydraException

from usllm.callbacks import NanGuard
from usllm.cli import train

CONF = Path(__file__).parents[2] / "conf" / "hydra"


def arguments(text: Path, root: Path, *more: str) -> list[str]:
    fast = ["trainer.max_steps=4", "callbacks.checkpoint.every_n_train_steps=2", "~callbacks.progress"]
    return ["experiment=tiny", f"data.train.path={text}", f"output_root={root}", *fast, *more]


def sweep(monkeypatch: pytest.MonkeyPatch, text: Path, root: Path, *more: str) -> None:
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["usllm-train", "-m", *arguments(text, root, *more)])
    train.main()


def reports(root: Path) -> dict[str, dict[str, Any]]:
    """Reports by folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in root.rglob("report.json")}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The optimizer steps that are made, in order. A test may interrupt the run at one of them."""
    steps: list[int] = []
    ordinary = NanGuard.on_before_optimizer_step

    def count(self: NanGuard, trainer: Any, *rest: Any) -> None:
        steps.append(trainer.global_step + 1)
        ordinary(self, trainer, *rest)

    monkeypatch.setattr(NanGuard, "on_before_optimizer_step", count)
    return steps


def interrupt_at(monkeypatch: pytest.MonkeyPatch, steps: list[int], position: int) -> None:
    """Press Ctrl-C at the step that is the ``position``-th to be made."""

    def interrupt(self: NanGuard, *_: Any) -> None:
        if len(steps) == position:
            raise KeyboardInterrupt

    monkeypatch.setattr(NanGuard, "on_before_backward", interrupt)


def test_sweep_started_again_skips_what_is_finished_and_resumes_what_was_interrupted(
    trained: list[int],
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, trained, 4 + 3)  # the second job has made 3 steps, 2 of them are in its checkpoint
        with pytest.raises(SystemExit):
            sweep(monkeypatch, tiny_text, tmp_path, "sketch.rows=1,2")
    assert trained == [1, 2, 3, 4, 1, 2, 3]
    (first,) = reports(tmp_path).values()
    assert first["config"]["sketch"]["rows"] == 1

    trained.clear()
    capsys.readouterr()
    sweep(monkeypatch, tiny_text, tmp_path, "sketch.rows=1,2")
    assert trained == [3, 4]
    shown = capsys.readouterr().out
    assert shown.count("Finished before:") == 1  # one line for the first job, the tables of the second
    assert shown.count("Perplexity, tiny") == 1
    done = reports(tmp_path)
    assert sorted(report["config"]["sketch"]["rows"] for report in done.values()) == [1, 2]
    assert all("-m" not in shlex.split(report["command"]) for report in done.values())

    # The same job by itself finds the same directory: it is the run that the sweep has finished.
    trained.clear()
    command = next(r["command"] for r in done.values() if r["config"]["sketch"]["rows"] == 2)
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "resume=true"])
    train.main()
    assert trained == []


def test_failed_job_does_not_end_the_sweep(
    trained: list[int], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep(monkeypatch, tiny_text, tmp_path, "sketch.rows=0,1")
    assert trained == [1, 2, 3, 4]
    message = capsys.readouterr().err
    assert "sketch.rows=0" in message
    assert "Traceback" not in message


def test_explicit_resume_false_refuses_used_directories(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "report.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        sweep(monkeypatch, tiny_text, tmp_path, f"run_dir={tmp_path}/used", "resume=false")
    assert "already holds a run" in capsys.readouterr().err


def test_several_devices_with_a_launching_strategy_are_refused(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("LOCAL_RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="2"):
        sweep(monkeypatch, tiny_text, tmp_path, "trainer.devices=2", "trainer.strategy=ddp", "seed=1,2")
    message = capsys.readouterr().err
    assert "every rank would run the whole sweep again" in message
    assert "torchrun" in message
    assert not reports(tmp_path)


@pytest.mark.parametrize("launcher", ["parallel", pytest.param("slurm_local", marks=pytest.mark.slow)])
def test_job_runs_in_a_process_of_its_own(
    launcher: str, trained: list[int], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("joblib" if launcher == "parallel" else "submitit")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sweep(monkeypatch, tiny_text, tmp_path, f"hydra/launcher={launcher}", "sketch.rows=1")
    assert trained == []  # not in this one
    assert len(reports(tmp_path)) == 1


def test_optuna_goes_on_with_the_interrupted_trial_and_runs_what_is_left(
    trained: list[int], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna")
    search = ["hydra/sweeper=bayes", "hydra.sweeper.n_trials=3", "optimizer.lr=tag(log,interval(1e-4,1e-2))"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, trained, 4 + 3)
        with pytest.raises(SystemExit):
            sweep(monkeypatch, tiny_text, tmp_path, *search)
    trained.clear()
    sweep(monkeypatch, tiny_text, tmp_path, *search)
    assert trained == [3, 4, 1, 2, 3, 4]
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path}/tiny/optuna.db")
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[1].params == study.trials[2].params
    by_rate = {r["config"]["optimizer"]["lr"]: r["perplexity"][0]["finetuned"] for r in reports(tmp_path).values()}
    assert {t.params["optimizer.lr"]: t.value for t in study.trials if t.value is not None} == pytest.approx(by_rate)

    trained.clear()
    sweep(monkeypatch, tiny_text, tmp_path, *search)  # all trials are there
    assert trained == []


@pytest.mark.parametrize(
    "choice",
    [f"{group}={path.stem}" for group in ("launcher", "sweeper") for path in sorted((CONF / group).glob("*.yaml"))],
)
def test_launcher_and_sweeper_compose(choice: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_module(config_module="usllm.conf", version_base="1.3"):
        cfg = compose("train", [f"hydra/{choice}"], return_hydra_config=True)
    node = cfg.hydra.launcher if choice.startswith("launcher") else cfg.hydra.sweeper
    assert node._target_.startswith("hydra_plugins.")


def test_user_error_of_a_job_reaches_hydra_as_one_message(capsys: Any) -> None:
    from usllm.cli.command import report_errors
    from usllm.system.errors import UserError

    def task() -> None:
        raise UserError("sketch.rows=0: too few")

    with pytest.raises(CompactHydraException, match=r"usllm-train: error: sketch\.rows=0"):
        report_errors("usllm-train", task, in_sweep=True)
