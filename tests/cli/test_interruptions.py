"""What may happen to a run from outside: it is told to leave, the disk runs full, a second one wants its directory."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import command, killed_after

from usllm.callbacks import NanGuard
from usllm.cli import train
from usllm.system.lock import sole_user
from usllm.training import load_checkpoint

EVERY_TWO_STEPS = "callbacks.checkpoint.every_n_train_steps=2"


def arguments(text: Path, run_dir: Path, *more: str) -> list[str]:
    return ["experiment=tiny", f"data.train.path={text}", f"run_dir={run_dir}", "~callbacks.progress", *more]


def run_here(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["usllm-train", *argv])
    train.main()


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Call ``act`` before the first optimizer step behind ``step``."""
    ordinary, done = NanGuard.on_before_optimizer_step, []

    def hook(self: NanGuard, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == step and not done:
            done.append(step)
            act()
        ordinary(self, trainer, *rest)

    monkeypatch.setattr(NanGuard, "on_before_optimizer_step", hook)


def test_terminated_process_saves_its_step_and_exits_with_the_code_for_requeue(tiny_text: Path, tmp_path: Path) -> None:
    killer = ["+callbacks.killer._target_=killing.TermAt", "+callbacks.killer.step=4"]
    done = subprocess.run(
        [sys.executable, "-m", "usllm.cli.train", *arguments(tiny_text, tmp_path / "run", *killer)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.returncode == 75, done.stderr
    assert "preempted by SIGTERM after step 5; the same command with resume=true continues" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=00000005.ckpt"]
    assert not (tmp_path / "run" / "failure.json").exists()


MOMENTS = {
    "in-training": (
        [],
        ("usllm.callbacks.nan_guard", "NanGuard.on_before_optimizer_step", 3),
        "after step 3, which is saved",
    ),
    "without-the-callback": (
        ["~callbacks.preemption"],
        ("usllm.callbacks.nan_guard", "NanGuard.on_before_backward"),
        "",
    ),
    "while-calibrating": ([], ("usllm.stages.calibrate", "measure_statistics"), ""),
    "while-reading": ([], ("usllm.runs.beginning", "build_data"), ""),
}


@pytest.mark.parametrize(("more", "moment", "saved"), MOMENTS.values(), ids=MOMENTS)
def test_ctrl_c_leaves_with_its_status_and_says_how_to_go_on(
    more: list[str], moment: tuple[Any, ...], saved: str, tiny_text: Path, tmp_path: Path
) -> None:
    pressed = killed_after(*moment, number=signal.SIGINT)
    status, output = command("train", *arguments(tiny_text, tmp_path / "run", *more), folder=tmp_path, before=pressed)
    assert status == 130, output
    last = output.splitlines()[-1]
    assert last.startswith(f"usllm-train: interrupted{' ' * bool(saved)}{saved}")
    assert last.endswith("; the same command with resume=true continues")
    assert "Traceback" not in output
    assert len(list(tmp_path.rglob("*.ckpt"))) == bool(saved)


def test_preempted_study_is_left_with_the_same_code(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    variants = "+study={name:quality,variants:{a:{sketch:{rows:1}}}}"
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, *arguments(tiny_text, tmp_path / "run", variants))
    assert ended.value.code == 75
    assert len(list((tmp_path / "run" / "a" / "checkpoints").glob("*.ckpt"))) == 1


def test_full_disk_ends_the_run_with_one_message_and_whole_checkpoints(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # No file may grow beyond 300 kB from step 3 on, as if the disk had no more to give: a checkpoint takes 1 MB.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "run" / "checkpoints"
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1])))
        try:
            with pytest.raises(SystemExit) as ended:
                run_here(monkeypatch, *arguments(tiny_text, tmp_path / "run", EVERY_TWO_STEPS))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1
    assert "step=00000004.ckpt could not be written" in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert [path.name for path in folder.iterdir()] == ["step=00000002.ckpt"]
    assert load_checkpoint(folder / "step=00000002.ckpt")["global_step"] == 2

    run_here(monkeypatch, *arguments(tiny_text, tmp_path / "run", EVERY_TWO_STEPS, "resume=true"))
    assert (tmp_path / "run" / "report.json").is_file()


def test_second_run_in_a_directory_is_refused(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with sole_user(tmp_path / "run"), pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, *arguments(tiny_text, tmp_path / "run", "resume=true"))
    assert ended.value.code == 2
    assert f"in use by process {os.getpid()} on" in capsys.readouterr().err


def test_finished_run_answers_for_no_other_configuration(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(monkeypatch, *arguments(tiny_text, tmp_path / "run", "trainer.max_steps=2"))
    with pytest.raises(SystemExit) as ended:
        run_here(
            monkeypatch,
            *arguments(tiny_text, tmp_path / "run", "resume=true", "sketch.rows=1", "evaluation.windows=[16]"),
        )
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "evaluation.windows: [32] in the finished run, [16] in this one" in message
    assert "usllm-eval" in message
    assert "sketch.rows: 2 in the finished run, 1 in this one" in message
    assert "trainer.max_steps" in message
    same = ["resume=true", "trainer.max_steps=2", "evaluation.batch_size=2"]  # how fast, not what
    run_here(monkeypatch, *arguments(tiny_text, tmp_path / "run", *same))
