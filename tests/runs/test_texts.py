"""What a run says about its texts: changed since the checkpoint, shared with a test set, how windows begin; its end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from usllm.callbacks import NanGuard
from usllm.cli import eval as evaluation
from usllm.cli import train
from usllm.runs.saved_run import stored_config
from usllm.training import latest_checkpoint, load_checkpoint


def run_here(text: Path, run_dir: Path, *more: str) -> dict[str, Any]:
    """The report of a run of four steps."""
    few = ["trainer.max_steps=4", "callbacks.checkpoint.every_n_train_steps=2", "~callbacks.progress"]
    argv = ["usllm-train", "experiment=tiny", f"data.train.path={text}", f"run_dir={run_dir}", *few, *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        train.main()
    report: dict[str, Any] = json.loads((run_dir / "report.json").read_text())
    return report


def refused(capsys: pytest.CaptureFixture[str], text: Path, run_dir: Path, *more: str) -> str:
    """The one line with which a run is refused, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_here(text, run_dir, *more)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def stopped(tiny_text: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Text and directory of a run that was interrupted after its second step."""

    def interrupt(self: NanGuard, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 3:
            raise KeyboardInterrupt

    text = tmp_path / "text.txt"
    text.write_bytes(tiny_text.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NanGuard, "on_before_optimizer_step", interrupt)
        with pytest.raises(SystemExit):
            run_here(text, tmp_path / "run")
    return text, tmp_path / "run"


def test_resumed_run_whose_text_has_changed_is_refused(
    stopped: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text, run_dir = stopped
    text.write_text(text.read_text().replace("cat", "dog"))
    line = refused(capsys, text, run_dir, "resume=true")
    assert "the text has changed since the checkpoint was made: data.train: 36 documents of" in line
    assert not (run_dir / "report.json").exists()


def test_text_that_was_moved_and_packed_goes_on(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    import gzip

    text, run_dir = stopped
    moved = tmp_path / "moved.txt.gz"
    moved.write_bytes(gzip.compress(text.read_bytes()))
    text.unlink()
    assert run_here(moved, run_dir, "resume=true")["steps"] == 4


def test_checkpoint_without_an_identity_goes_on_from_the_same_path_only(
    stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, run_dir = stopped
    path = latest_checkpoint(run_dir / "checkpoints")
    assert path is not None
    saved = load_checkpoint(path, mmap=False)
    del saved["TextDataModule"], saved["usllm"]["config"]["data"]["window_start"]
    del saved["usllm"]["config"]["evaluation"]["window_start"]
    torch.save(saved, path)
    assert stored_config(saved, path)["data"]["window_start"] == "none"
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes())
    assert "data.train.path:" in refused(capsys, other, run_dir, "resume=true")
    assert "data.window_start: none in the checkpoint, each in this run" in refused(
        capsys, text, run_dir, "resume=true", "data.window_start=each"
    )
    assert run_here(text, run_dir, "resume=true")["steps"] == 4


def test_windows_begin_alike_in_training_and_measurement(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run_here(tiny_text, tmp_path / "each", "data.window_start=each")
    (row,) = report["perplexity"]
    assert row["window_start"] == "each"
    assert report["tokenizer"]["bos"] == "one <|endoftext|> at the start of each window"
    assert report["config"]["data"]["window_start"] == report["config"]["evaluation"]["window_start"] == "each"
    (plain,) = run_here(tiny_text, tmp_path / "none")["perplexity"]
    assert plain["window_start"] == "none"
    assert plain["dense"] != row["dense"]
    monkeypatch.setattr(sys, "argv", ["usllm-eval", f"ckpt={tmp_path}/each", f"run_dir={tmp_path}/measured"])
    evaluation.main()
    (measured,) = json.loads((tmp_path / "measured" / "evaluation.json").read_text())["perplexity"]
    assert measured["window_start"] == "each"
    assert measured["perplexity"] == pytest.approx(row["finetuned"], rel=1e-6)


def test_the_training_text_as_test_set_is_refused_unless_allowed_by_name(
    tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link.txt"
    link.symlink_to(tiny_text)
    same = ["+evaluation.test_sets.own.kind=text", f"+evaluation.test_sets.own.path={link}"]
    line = refused(capsys, tiny_text, tmp_path / "run", *same)
    assert "evaluation.test_sets.own: " in line
    assert "is also data.train" in line
    assert "evaluation.allow_shared=[own]" in line
    report = run_here(tiny_text, tmp_path / "run", *same, "evaluation.allow_shared=[own]")
    assert {row["test_set"] for row in report["perplexity"]} == {"validation", "own"}
    (warning,) = report["warnings"]
    assert "36 of 40 documents (90.0%) of test set own" in warning
    assert warning in " ".join(capsys.readouterr().out.split())


def test_copy_of_training_documents_in_a_test_set_is_a_warning(tiny_text: Path, tmp_path: Path) -> None:
    documents = tiny_text.read_text().split("\n\n")
    own = [f"Sentence {number} that no other text has ever made any use of." for number in range(80)]
    (tmp_path / "test.txt").write_text("\n\n".join([*own, documents[0].upper(), documents[1], documents[2]]))
    test_set = ["+evaluation.test_sets.t.kind=text", f"+evaluation.test_sets.t.path={tmp_path}/test.txt"]
    report = run_here(tiny_text, tmp_path / "run", *test_set)
    counted = {one["test_set"]: (one["documents"], one["shared"]) for one in report["shared_documents"]}
    assert counted["validation"] == (4, 0)
    documents_of_test, shared = counted["t"]
    assert documents_of_test == 83
    assert 1 <= shared <= 3  # a tenth of the documents is held out
    assert any("of test set t are in the text of training" in line for line in report["warnings"])


def test_early_end_is_said(tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopping = ["callbacks=[default,early_stopping]", "callbacks.early_stopping.patience=1"]
    # The second validation is no better by a thousand nats.
    worse = ["callbacks.early_stopping.min_delta=1000", "trainer.max_steps=8"]
    report = run_here(tiny_text, tmp_path / "run", *stopping, *worse, "trainer.val_check_interval=2")
    assert report["steps"] == 4
    assert report["max_steps"] == 8
    assert report["ended_early"].startswith("early stopping: Monitored metric val/loss did not improve")
    out = capsys.readouterr().out
    assert "4 of 8 steps" in out
    assert "ended early" in out
    whole = run_here(tiny_text, tmp_path / "whole")
    assert (whole["steps"], whole["max_steps"], whole["ended_early"]) == (4, 4, None)


def test_time_limit_of_the_trainer_ends_a_run(tiny_text: Path, tmp_path: Path) -> None:
    report = run_here(tiny_text, tmp_path / "run", "+trainer.max_time={days: 0, microseconds: 1}")
    assert report["steps"] == 1
    assert report["ended_early"].startswith("its time was up")


def test_two_time_limits_are_refused(tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = ["callbacks=[default,timer]", "+trainer.max_time='00:01:00:00'"]
    assert "the callback timer sets the length of time" in refused(capsys, tiny_text, tmp_path / "run", *two)


def test_run_without_the_checkpoint_callback_saves_nothing(tiny_text: Path, tmp_path: Path) -> None:
    without = [f"data.train.path={tiny_text}", f"run_dir={tmp_path}/run", "trainer.max_steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["usllm-train", "experiment=tiny", *without, "~callbacks.checkpoint"])
        train.main()
    assert list((tmp_path / "run").rglob("*.ckpt")) == []


def test_length_in_passes_is_compared_with_warmup(
    tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = ["trainer.max_steps=null", "trainer.epochs=0.01", "optimizer.warmup_steps=500"]
    assert "optimizer.warmup_steps=500: longer than" in refused(capsys, tiny_text, tmp_path / "run", *passes)
