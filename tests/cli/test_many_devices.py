"""``usllm-train`` on two processes, as Lightning starts them: one run, one report, one end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_train import KILLER, arguments, run_apart, run_here

from usllm.training import load_checkpoint


def perplexities(run_dir: Path) -> list[float]:
    """Figures of all stages."""
    (row,) = json.loads((run_dir / "report.json").read_text())["perplexity"]
    return [row[stage] for stage in ("dense", "sketched", "finetuned")]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", [[], ["sketch=sign", "sketch.bits_per_weight=1.5"]], ids=["tiny", "sign"])
def test_sharded_run_is_killed_continued_by_one_process_and_reported_as_if_it_had_always_been_one(
    method: list[str],
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    alike = ["reuse_statistics=false", *method]
    two = ["trainer.devices=2", "trainer.strategy=fsdp2", "data.batch_size=1", *alike]
    run_here(monkeypatch, *arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/one", *alike))

    whole = run_apart(*arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/two", *two))
    assert whole.returncode == 0, whole.stderr
    assert whole.stderr.count("Reading and tokenising") == 1
    assert whole.stdout.count("Perplexity, tiny") == 1
    assert perplexities(tmp_path / "two") == pytest.approx(perplexities(tmp_path / "one"), rel=1e-5)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert (report["steps"], report["tokens"]) == (8, 8 * 2 * 32)

    killed = run_apart(*arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/killed", *two, *KILLER))
    assert killed.returncode != 0
    assert not (tmp_path / "killed" / "report.json").exists()
    capsys.readouterr()
    again = arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/killed", "resume=true", *alike)
    with pytest.raises(SystemExit):
        run_here(monkeypatch, *again, "data.batch_size=3")
    assert "1 x 1 x 2 = 2 in the checkpoint, 3 x 1 x 1 = 3 in this run" in capsys.readouterr().err
    run_here(monkeypatch, *again)
    assert perplexities(tmp_path / "killed") == pytest.approx(perplexities(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(("strategy", "window"), [("ddp", 1), pytest.param("fsdp2", 2, marks=pytest.mark.slow)])
def test_two_ranks_reconstruct_as_one_process_does(
    strategy: str, window: int, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = ["stages=[default,reconstruct]", "stages.reconstruct.sequences=16", "stages.reconstruct.batch_size=3"]
    stage += ["stages.reconstruct.steps=6", "stages.reconstruct.warmup_steps=1", f"stages.reconstruct.window={window}"]
    alike = [*stage, "trainer.max_steps=0", "reuse_statistics=false"]
    run_here(monkeypatch, *arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/one", *alike))
    two = ["trainer.devices=2", f"trainer.strategy={strategy}", "data.batch_size=1"]
    done = run_apart(*arguments(tiny_text, tmp_path, f"run_dir={tmp_path}/two", *alike, *two))
    assert done.returncode == 0, done.stderr
    devices = json.loads((tmp_path / "two" / "report.json").read_text())["devices"]
    assert devices["processes"] == 2 and devices["kind"] == "cpu"
    (one,) = (tmp_path / "one" / "checkpoints").iterdir()
    (other,) = (tmp_path / "two" / "checkpoints").iterdir()
    expected, found = load_checkpoint(one)["state_dict"], load_checkpoint(other)["state_dict"]
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if value.is_floating_point():  # a code at the edge of two may fall to either side
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def two_ranks(text: Path, run_dir: Path, strategy: str, callback: str, step: int) -> list[str]:
    """A run that one of ``killing``'s callbacks ends; with one checkpoint every two steps."""
    end = [f"+callbacks.end._target_=killing.{callback}", f"+callbacks.end.step={step}"]
    few = ["callbacks.checkpoint.every_n_train_steps=2", "data.batch_size=1", "reuse_statistics=false"]
    devices = ["trainer.devices=2", f"trainer.strategy={strategy}"]
    return arguments(text, run_dir.parent, f"run_dir={run_dir}", *devices, *few, *end)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2_cpu_offload"])
def test_full_disk_of_rank_0_ends_all_ranks_with_its_message_and_whole_checkpoints(
    strategy: str, tiny_text: Path, tmp_path: Path
) -> None:
    # Its end is awaited: the output is read until no rank holds it open.
    ended = run_apart(*two_ranks(tiny_text, tmp_path / "run", strategy, "FullDiskAt", 2))
    assert ended.returncode == 1, ended.stderr
    own, others = "error: checkpoint", "error: rank 0 has failed: checkpoint"
    for beginning in (own, others):
        (line,) = [line for line in ended.stderr.splitlines() if beginning in line]
        assert "step=00000004.ckpt could not be written" in line
    assert "Traceback" not in ended.stderr
    (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert kept.name == "step=00000002.ckpt"
    assert load_checkpoint(kept)["global_step"] == 2


@pytest.mark.slow
def test_failure_of_rank_0_alone_ends_the_rank_that_waits_for_it(tiny_text: Path, tmp_path: Path) -> None:
    ended = run_apart(*two_ranks(tiny_text, tmp_path / "run", "ddp", "FailAt", 3))
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("error:") == 1
    assert "error: rank 0 alone cannot go on" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_ranks_that_are_told_to_leave_exit_with_the_code_for_requeue(tiny_text: Path, tmp_path: Path) -> None:
    ended = run_apart(*two_ranks(tiny_text, tmp_path / "run", "ddp", "TermAt", 3))
    assert ended.returncode == 75, ended.stderr
    assert ended.stderr.count("preempted by SIGTERM after step 4") == 2
    assert "Traceback" not in ended.stderr
