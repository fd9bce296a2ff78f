"""What the commands share: errors as messages, each with its status."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from preloaded import PRELOADED

from usllm.cli.command import EXIT_BROKEN_PIPE, EXIT_USER_ERROR, report_errors
from usllm.system.errors import UserError


def test_user_error_is_a_message_and_status_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def task() -> None:
        raise UserError("sketch.rows=0: too few")

    with pytest.raises(SystemExit) as ended:
        report_errors("usllm-train", task)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "usllm-train: error: sketch.rows=0: too few\n"


def test_no_configuration_says_in_which_mode_hydra_runs() -> None:
    """Commands of the tests go by that (``commands.py``)."""
    files = [path for path in (Path(__file__).parents[2] / "conf").rglob("*.yaml") if path.parent.name != "local"]
    read = {path: OmegaConf.load(path) for path in files}
    assert read
    for path, content in read.items():
        hydra = content if path.parent.name == "hydra" else content.get("hydra")
        assert not isinstance(hydra, DictConfig) or "mode" not in hydra, path


@pytest.mark.parametrize(("choice", "advice"), [("triton", "leave it at auto"), ("tritn", "choose one of")])
def test_kernels_that_cannot_run_are_refused_before_any_work(
    choice: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USLLM_KERNELS", choice)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        report_errors("usllm-train", lambda: pytest.fail("work was begun"))
    assert stopped.value.code == EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"usllm-train: error: USLLM_KERNELS={choice}")
    assert advice in line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv"), ["metrics.csv", "free space"]),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG), "a.ckpt"), ["a.ckpt", "free space"]),
        (RuntimeError("I/O error: No space left on device (os error 28)"), ["free space"]),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "run"), ["Read-only", "choose another one"]),
        (OSError(errno.EIO, os.strerror(errno.EIO), "metrics.csv"), ["metrics.csv", "choose another one"]),
        (MemoryError(), ["memory ran out", "lower the batch size"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ["memory ran out"]),
    ],
)
def test_failure_of_the_system_is_a_message_and_status_one(
    error: Exception, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit, match="1"):
        report_errors("usllm-train", fail)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("usllm-train: error:")
    assert all(word in line for word in words)


def test_interruption_in_a_library_that_leaves_by_itself_has_the_status_of_ctrl_c(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def leave() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning does

    with pytest.raises(SystemExit, match="130"):
        report_errors("usllm-train", leave, resumes=True)
    assert capsys.readouterr().err == "usllm-train: interrupted; the same command with resume=true continues\n"


def test_a_bug_keeps_its_traceback() -> None:
    def task() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        report_errors("usllm-train", task)


def _leave_imported(file: Path) -> None:
    file.write_text("\n".join(sys.modules))


def test_forked_processes_of_the_tests_have_imported_what_commands_need(tmp_path: Path) -> None:
    """The server of forks says nothing of a module that it does not find, and each command would take seconds more."""
    pytest.importorskip("numba")
    process = multiprocessing.get_context("forkserver").Process(target=_leave_imported, args=(tmp_path / "names",))
    process.start()
    process.join()
    assert set(PRELOADED) - set((tmp_path / "names").read_text().split()) == set()


@pytest.mark.parametrize("asked", [["--help"], ["--cfg", "job"], ["-sc", "install=bash"]], ids=lambda asked: asked[0])
def test_output_that_nobody_reads_any_more_ends_a_command_without_a_word(asked: list[str]) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as gone:
        command = [sys.executable, "-m", "usllm.cli.train", *asked]
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (EXIT_BROKEN_PIPE, "")
