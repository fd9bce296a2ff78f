"""The sweep configurations of W&B: what `wandb agent` would run, that it trains, and that a re-queued trial resumes.

The agent is the real one. Its back end, and the processes that it starts, are faked at their boundary.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb.apis.public.sweeps as backend
import yaml
from composing import composed
from wandb import wandb_agent

from usllm.callbacks import NanGuard
from usllm.cli import train
from usllm.cli.arguments import without_wandb_argument
from usllm.config import check_train
from usllm.experiments.variants import metric_curve

SWEEPS = Path(__file__).parents[2] / "conf" / "sweep"
NAMES = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
TRIALS: dict[str, dict[str, Any]] = {
    "grid": {"sketch.bits_per_weight": 0.5, "sketch.rows": 2},
    "methods": {"sketch": "littlebit", "sketch.bits_per_weight": 1.0},
    "bayes": {
        "optimizer.lr": 0.00031622776601683794,
        "optimizer.latents.relative_lr": 0.005,
        "objective.kl_weight": 1.25,
        "objective.hidden_weight": 0.5,
        "objective.cross_entropy_weight": 0.25,
        "callbacks.sketch_reprojection.every_n_steps": 4,
    },
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The agent sets variables of its process; they go when the test ends."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")


def sweep_config(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((SWEEPS / f"{name}.yaml").read_text()))


def run_agent(
    monkeypatch: pytest.MonkeyPatch, sweep: dict[str, Any], *commands: dict[str, Any]
) -> list[tuple[list[str], dict[str, str]]]:
    """What an agent starts when the server sends ``commands``: command lines, and their environments."""
    started: list[tuple[list[str], dict[str, str]]] = []
    sent = [[command] for command in commands]

    class Finished:
        """A process that has ended well."""

        def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
            started.append((command, env))
            self.stdin = open(os.devnull)  # noqa: SIM115 - the agent closes it

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Finished)
    monkeypatch.setattr(backend, "_sweep_with_runs", lambda *_, **__: {"config": yaml.safe_dump(sweep)})
    monkeypatch.setattr(backend, "_register_agent", lambda *_, **__: {"id": "agent"})
    monkeypatch.setattr(backend, "_agent_heartbeat", lambda *_: sent.pop(0) if sent else [{"type": "exit"}])
    monkeypatch.setattr(wandb_agent.util, "read_many_from_queue", lambda *_: [])
    monkeypatch.setattr(wandb_agent.wandb, "Api", lambda: None)
    monkeypatch.setattr(wandb_agent.wandb, "teardown", lambda *_: None)
    os.environ["WANDB_SWEEP_ID"] = "s1"
    wandb_agent.Agent(None, queue.Queue(), sweep_id="s1").run()
    return started


def server_command(kind: str, run_id: str, parameters: dict[str, Any]) -> dict[str, Any]:
    values = {name: {"value": value} for name, value in parameters.items()}
    return {"type": kind, "run_id": run_id, "program": "usllm-train", "args": values}


def test_every_sweep_has_a_trial_here() -> None:
    assert sorted(TRIALS) == NAMES
    for name in NAMES:
        assert sorted(sweep_config(name)["parameters"]) == sorted(TRIALS[name])


@pytest.mark.parametrize("name", NAMES)
def test_no_trial_is_ended_early_by_the_signal_that_would_queue_it_again(name: str) -> None:
    signals = check_train(composed(*sweep_config(name)["command"][2:-1])).callbacks["preemption"]["signals"]  # type: ignore[index]
    assert "early_terminate" not in sweep_config(name) or "SIGTERM" not in signals


@pytest.mark.parametrize("name", NAMES)
def test_command_of_a_trial_is_complete_and_composes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        ((command, environment),) = run_agent(patch, sweep_config(name), server_command("run", "r1", TRIALS[name]))
    assert command[:2] == ["/usr/bin/env", "usllm-train"]
    assert {"logger=wandb", "resume=true"} <= set(command)
    assert command[-len(TRIALS[name]) :] == [f"{key}={value}" for key, value in TRIALS[name].items()]
    assert (environment["WANDB_SWEEP_ID"], environment["WANDB_RUN_ID"]) == ("s1", "r1")
    os.environ.update({"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1"})
    config = check_train(composed(*command[2:]))
    assert config.run_dir == "runs/sweep/s1/r1"
    assert config.resume


def test_trial_trains_and_resumes_when_it_is_queued_again(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_config("grid")
    sweep["command"] = [word.replace("runs/", f"{tmp_path}/") for word in sweep["command"]]
    sweep["command"][sweep["command"].index("experiment=demo")] = "experiment=tiny"
    # W&B repeats the parameters of a trial that it starts again, with one of its own among them.
    again = {**TRIALS["grid"], "_wandb": {"sweep": "s1"}}
    with monkeypatch.context() as patch:
        first, second = run_agent(
            patch, sweep, server_command("run", "r1", TRIALS["grid"]), server_command("resume", "r1", again)
        )
    assert any(word.startswith("_wandb=") for word in second[0])
    assert without_wandb_argument(second[0]) == first[0]

    extra = [f"data.train.path={tiny_text}", "trainer.max_steps=4", "~callbacks.progress"]
    steps: list[int] = []
    ordinary = NanGuard.on_before_optimizer_step

    def interrupt(self: NanGuard, trainer: Any, *rest: Any) -> None:
        steps.append(trainer.global_step + 1)
        if steps == [1, 2, 3]:
            raise KeyboardInterrupt
        ordinary(self, trainer, *rest)

    monkeypatch.setattr(NanGuard, "on_before_optimizer_step", interrupt)
    for command, environment in (first, second):
        for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
            monkeypatch.setenv(name, environment[name])
        monkeypatch.setattr(sys, "argv", [*command[1:], *extra, "callbacks.checkpoint.every_n_train_steps=2"])
        if command is first[0]:
            with pytest.raises(SystemExit):
                train.main()
        else:
            train.main()
    assert steps == [1, 2, 3, 3, 4]
    report = json.loads((tmp_path / "sweep" / "s1" / "r1" / "report.json").read_text())
    assert report["config"]["sketch"]["bits_per_weight"] == 0.5
    # The metric that every sweep asks for is logged under that very name.
    (metric,) = {sweep_config(name)["metric"]["name"] for name in NAMES}
    assert metric_curve(tmp_path / "sweep" / "s1" / "r1", metric)[1]


def test_only_wandbs_own_argument_is_dropped() -> None:
    kept = ["sketch.rows=1", "logger=wandb", "logger.wandb.project=x"]
    assert without_wandb_argument([*kept, "_wandb={'a': 1}", "--_wandb={}", "+_wandb={}"]) == kept
