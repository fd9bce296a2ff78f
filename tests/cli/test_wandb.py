"""A run logged to W&B, offline: one run id whatever happens, things to look at, and a trajectory undisturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from usllm.callbacks import NanGuard
from usllm.cli import export, train
from usllm.experiments.variants import metric_curve

SETTINGS = [
    "~callbacks.progress",
    "callbacks.checkpoint.every_n_train_steps=3",
    "callbacks.text_samples.prompts=[the cat,seven dogs]",
    "callbacks.text_samples.max_new_tokens=3",
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test of this file may reach a server, or leave a run open for the next one."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it keeps the environment that it saw first, which may have been another test's
    yield
    assert wandb.run is None
    wandb.teardown()


def run_here(monkeypatch: pytest.MonkeyPatch, text: Path, run_dir: Path, *more: str) -> None:
    argv = ["usllm-train", "experiment=tiny", f"data.train.path={text}", f"run_dir={run_dir}", *SETTINGS, *more]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()


def weights(run_dir: Path) -> dict[str, Any]:
    checkpoint = torch.load(max((run_dir / "checkpoints").glob("*.ckpt")), weights_only=True)
    moments = {f"{i}.{k}": v for i, s in checkpoint["optimizer_states"][0]["state"].items() for k, v in s.items()}
    return {**checkpoint["state_dict"], **moments}


def tables(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """W&B's tables by key, in the order in which they were logged."""
    found: dict[str, list[dict[str, Any]]] = {}
    paths = list((run_dir / "wandb").glob("offline-run-*/files/media/table/*.table.json"))
    for path in sorted(paths, key=lambda path: (path.parts[-5], int(path.name.split("_")[-2]))):
        found.setdefault(path.name.rsplit("_", 2)[0], []).append(json.loads(path.read_text()))
    return found


def test_preempted_and_resumed_run_is_one_run_with_one_curve_and_an_undisturbed_trajectory(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = NanGuard.on_before_optimizer_step
    marked: list[str] = []

    def leave(self: NanGuard, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        ordinary(self, trainer, *rest)

    begun: list[dict[str, Any]] = []
    configs: list[dict[str, Any]] = []
    begin, end = wandb.init, wandb.Run.finish

    def init(**arguments: Any) -> Any:
        begun.append(arguments)
        return begin(**arguments)

    def finish(run: Any, **arguments: Any) -> None:
        configs.append(dict(run.config))
        end(run, **arguments)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb.Run, "finish", finish)
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(NanGuard, "on_before_optimizer_step", leave)
        patch.setattr("wandb.Run.mark_preempting", lambda run: marked.append(run.id))
        with pytest.raises(SystemExit) as ended:
            run_here(monkeypatch, tiny_text, run_dir, "logger=wandb")
    assert ended.value.code == 75
    run_here(monkeypatch, tiny_text, run_dir, "logger=wandb", "logger.wandb.tags=[mine]", "resume=true")

    run_id = (run_dir / "wandb_id.txt").read_text().strip()
    assert marked == [run_id]
    parts = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert [part.name.split("-")[-1] for part in parts] == [run_id, run_id]
    assert metric_curve(run_dir, "train/loss")[0] == list(range(8))

    logged = tables(run_dir)
    assert set(logged) == {"layers", "samples", "perplexity", "health"}
    assert logged["layers"][-1]["columns"][0] == "layer"
    assert len(logged["layers"][-1]["data"]) == 12
    # The samples of the part that was ended are in the last table too: before training, after steps 4 and 8.
    assert [row[0] for row in logged["samples"][-1]["data"]] == [0, 0, 3, 3, 7, 7]
    assert [row[0] for row in logged["perplexity"][-1]["data"]] == ["validation"]
    assert list(parts[0].glob("files/media/images/allocation_*.png"))

    assert [call["id"] for call in begun] == [run_id, run_id]
    assert {(call["project"], call["group"], call["job_type"]) for call in begun} == {("usllm", "tiny", "train")}
    assert begun[-1]["tags"] == ["mine"]
    assert configs[-1]["sketch"]["bits_per_weight"] == 1.0
    assert configs[-1]["run_dir"] == str(run_dir)
    assert set(configs[-1]["code"]) >= {"usllm"}

    # Looking at a run, and cutting it in two, changes nothing.
    run_here(monkeypatch, tiny_text, tmp_path / "plain", "logger=none", "~callbacks.text_samples")
    expected, found = weights(tmp_path / "plain"), weights(run_dir)
    assert expected.keys() == found.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]


@pytest.mark.slow
def test_run_that_was_killed_is_continued_under_its_id(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    killer = ["+callbacks.killer._target_=killing.KillAt", "+callbacks.killer.step=5", "logger=wandb"]
    argv = ["experiment=tiny", f"data.train.path={tiny_text}", f"run_dir={run_dir}", *SETTINGS, *killer]
    done = subprocess.run(
        [sys.executable, "-m", "usllm.cli.train", *argv],
        stdout=subprocess.DEVNULL,  # a pipe would stay open for as long as W&B's own process lives on
        stderr=subprocess.DEVNULL,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.returncode == -signal.SIGKILL
    run_id = (run_dir / "wandb_id.txt").read_text().strip()
    run_here(monkeypatch, tiny_text, run_dir, "logger=wandb", "resume=true")
    assert {part.name.split("-")[-1] for part in (run_dir / "wandb").glob("offline-run-*")} == {run_id}
    assert metric_curve(run_dir, "train/loss")[0] == list(range(8))


def test_jobs_of_a_sweep_are_runs_of_their_own(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["experiment=tiny", f"data.train.path={tiny_text}", f"output_root={tmp_path}", "trainer.max_steps=1"]
    few = ["callbacks=none", "logger=wandb", "seed=1,2"]
    monkeypatch.setattr(sys, "argv", ["usllm-train", "-m", *argv, *few])
    train.main()
    ids = [path.read_text() for path in tmp_path.rglob("wandb_id.txt")]
    assert len(set(ids)) == len(ids) == 2


def test_exports_of_a_finished_run_are_its_artifacts(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "waiting"))  # where W&B copies files that are to be sent later
    logged: list[tuple[str, dict[str, Any], wandb.Artifact]] = []
    ordinary = wandb.Run.log_artifact

    def log_artifact(run: wandb.Run, artifact: wandb.Artifact, *rest: Any, **more: Any) -> wandb.Artifact:
        if artifact.type == "packed-model":  # a table is one too
            logged.append((run.id, dict(run.config), artifact))
        return ordinary(run, artifact, *rest, **more)

    def pack(out: str) -> None:
        monkeypatch.setattr(sys, "argv", ["usllm-export", f"ckpt={tmp_path / 'run'}", f"out={tmp_path / out}"])
        export.main()

    monkeypatch.setattr(wandb.Run, "log_artifact", log_artifact)
    more = ["logger=wandb", "logger.wandb.log_export=true", "trainer.max_steps=1"]
    run_here(monkeypatch, tiny_text, tmp_path / "run", *more)
    pack("packed")
    run_id = (tmp_path / "run" / "wandb_id.txt").read_text().strip()
    ((of_run, config, artifact),) = logged
    assert of_run == run_id
    assert "code" not in config  # what trained is kept as it was
    assert set(artifact.manifest.entries) == {path.name for path in (tmp_path / "packed").iterdir()}
    assert artifact.metadata["bits_per_weight"] <= 1
    assert f"packed-model-{run_id}" in capsys.readouterr().out
    wandb.teardown()  # its own process has written all
    parts = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert [part.name.split("-")[-1] for part in parts] == [run_id, run_id]
    records = [next(part.glob("*.wandb")).read_bytes() for part in parts]
    assert sum(f"packed-model-{run_id}".encode() in record for record in records) == 1  # what `wandb sync` sends

    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (tmp_path / "run" / "report.json").write_text(json.dumps({**report, "finished": False}))
    pack("of_unfinished")
    assert "logger.wandb.log_export: not logged to W&B, the run has not ended" in capsys.readouterr().err
    assert len(logged) == 1


def test_disabled_mode_leaves_no_files(tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["logger=wandb", "logger.wandb.mode=disabled", "trainer.max_steps=1"]
    run_here(monkeypatch, tiny_text, tmp_path / "run", *more)
    assert (tmp_path / "run" / "report.json").is_file()
    assert not (tmp_path / "run" / "wandb").exists()
    assert not (tmp_path / "run" / "wandb_id.txt").exists()
