"""Runs on streamed corpora: killed and continued, on one and on two processes; what they say of what they left out."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command, killed_after
from test_train import KILLER, run_apart, saved_state

from usllm.system.metric_rows import read_rows

DENSE = ["stages=none", "evaluation.precision=fp32"]  # bf16 rounds weights that differ by 3e-6 to others
STEPS = 36  # of 4 sequences: more than four chunks of positions

TEXT = "the cat sat on a mat while seven dogs ran over green hills and sang of rivers that bend toward home"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of JSON lines."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for shard in range(4):
        rows = [
            {"text": f"{shard}.{n} " + " ".join(draw.choices(TEXT.split(), k=draw.randint(5, 90)))} for n in range(150)
        ]
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    given = ["experiment=tiny", "data=jsonl", f"data.train.path={corpus}/*.jsonl", "data.train.streaming=true"]
    given += ["data.validation_documents=20", "data.shuffle_buffer=64", f"trainer.max_steps={STEPS}"]
    given += ["trainer.val_check_interval=36", "trainer.accumulate_grad_batches=2", "reuse_statistics=false"]
    return [*given, "callbacks.checkpoint.every_n_train_steps=3", f"run_dir={run_dir}", "~callbacks.progress", *more]


def losses_of(run: Path) -> list[float]:
    return [float(row["train/loss"]) for row in read_rows(run / "csv/version_0/metrics.csv") if row["train/loss"]]


def report_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "report.json").read_text())


def position_of(run_dir: Path) -> dict[str, Any]:
    """Of the newest checkpoint."""
    path = max((run_dir / "checkpoints").glob("*.ckpt"))
    return torch.load(path, weights_only=True)["TextDataModule"]["streams"]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    done = command("train", *arguments(corpus, folder / "run"), folder=folder)
    assert done.status == 0, done.output
    assert (
        f"Training on {STEPS} steps x 4 sequences x 32 tokens = {STEPS * 4 * 32:,} tokens, read as they" in done.output
    )
    assert "stream data.train" in done.output
    return folder / "run"


@pytest.fixture(scope="module")
def whole_dense(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that trains the dense model, where no rounded sum turns a state: other splits stay equal to rounding."""
    folder = tmp_path_factory.mktemp("dense")
    done = command("train", *arguments(corpus, folder / "run", *DENSE), folder=folder)
    assert done.status == 0, done.output
    return folder / "run"


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "step", [20, pytest.param(4, marks=pytest.mark.slow), pytest.param(33, marks=pytest.mark.slow)]
)
def test_killed_and_resumed_run_equals_the_one_never_killed(
    workers: int, step: int, whole: Path, corpus: Path, tmp_path: Path
) -> None:
    killer = killed_after("usllm.callbacks.nan_guard", "NanGuard.on_before_optimizer_step", step)
    typed = arguments(corpus, tmp_path / "run", f"data.num_workers={workers}")
    killed = command("train", *typed, folder=tmp_path, before=killer)
    assert killed.status == -signal.SIGKILL, killed.output
    resumed = command("train", *typed, "resume=true", folder=tmp_path)
    assert resumed.status == 0, resumed.output
    expected, found = saved_state(whole), saved_state(tmp_path / "run")
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert position_of(tmp_path / "run") == position_of(whole)
    for key in ("perplexity", "streams", "tokens"):
        assert report_of(tmp_path / "run")[key] == report_of(whole)[key]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_take_the_sequences_of_one_and_go_on_as_one(
    strategy: str, whole_dense: Path, corpus: Path, tmp_path: Path
) -> None:
    two = [*DENSE, "trainer.devices=2", f"trainer.strategy={strategy}", "data.batch_size=1"]
    two.append("data.num_workers=1")
    done = run_apart(*arguments(corpus, tmp_path / "two", *two))
    assert done.returncode == 0, done.stderr
    one, other = report_of(whole_dense), report_of(tmp_path / "two")
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(whole_dense), rel=1e-5)
    assert other["perplexity"][0]["finetuned"] == pytest.approx(one["perplexity"][0]["finetuned"], rel=1e-5)
    assert other["tokens"] == one["tokens"]

    typed = arguments(corpus, tmp_path / "killed", *DENSE)
    killed = run_apart(*typed, *two, *KILLER[:1], "+callbacks.killer.step=25")
    assert killed.returncode != 0
    kept = position_of(tmp_path / "killed")["data.train"]
    assert sum(made for made, _, _ in kept["lanes"]) >= 64
    resumed = command("train", *typed, "resume=true", folder=tmp_path)
    assert resumed.status == 0, resumed.output
    found = report_of(tmp_path / "killed")["perplexity"][0]["finetuned"]
    assert found == pytest.approx(one["perplexity"][0]["finetuned"], rel=1e-5)


def test_broken_line_ends_the_run_with_its_name_and_is_left_out_where_asked(corpus: Path, tmp_path: Path) -> None:
    broken = tmp_path / "corpus"
    broken.mkdir()
    for path in corpus.iterdir():
        (broken / path.name).write_text(path.read_text())
    for path in broken.iterdir():  # whichever comes first: not in the first window
        rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join(rows[:110]) + '{"text": "cut\n' + "".join(rows[110:]))
    few = ["data.num_workers=1", "data.shuffle_buffer=16"]  # a small window: not met when the first one is read
    done = command("train", *arguments(broken, tmp_path / "run", *few), folder=tmp_path)
    assert done.status == 2, done.output
    (line,) = [line for line in done.output.splitlines() if "error:" in line]
    assert f"data.train: {broken}/" in line
    assert ".jsonl, line 111 is not JSON" in line
    assert "data.on_bad=skip" in line
    assert "Traceback" not in done.output

    again = command(
        "train", *arguments(broken, tmp_path / "run", *few, "resume=true", "data.on_bad=skip"), folder=tmp_path
    )
    assert again.status == 0, again.output
    (skipped,) = [facts["skipped"] for facts in report_of(tmp_path / "run")["streams"].values()]
    assert skipped["rows"] >= 1
    assert "jsonl, line 111" in skipped["examples"][0]
    assert f"skipped {skipped['rows']} rows and 0 files" in again.output
    assert "warning: data.train: what cannot be read is skipped" in again.output


def test_corpus_that_has_changed_is_not_continued(corpus: Path, tmp_path: Path) -> None:
    few = arguments(corpus, tmp_path / "run", "trainer.max_steps=3", "trainer.val_check_interval=1.0")
    killer = killed_after("usllm.callbacks.nan_guard", "NanGuard.on_before_optimizer_step", 3)
    typed = [*few, "callbacks.checkpoint.every_n_train_steps=1"]
    assert command("train", *typed, folder=tmp_path, before=killer).status == -signal.SIGKILL
    other = tmp_path / "corpus"
    other.mkdir()
    for path in sorted(corpus.iterdir())[:3]:
        (other / path.name).write_text(path.read_text())
    changed = [word.replace(str(corpus), str(other)) for word in typed]
    done = command("train", *changed, "resume=true", folder=tmp_path)
    assert done.status == 2, done.output
    assert "data.train: 4 files of" in done.output
    assert "in the checkpoint, 3 files of" in done.output
