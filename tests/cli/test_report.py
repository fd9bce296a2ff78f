"""``usllm-report`` from the command line: files, one clear message, no other traces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import config, write_run

from usllm.cli import report, train


def call(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["usllm-report", *argv])
    report.main()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "rate=0.5, 'one' row", config(0.5, 1, "waterfill"), blocks=2)


def test_a_report_is_written_and_nothing_else(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, f"runs={run_dir}", "out=my report, the=second", "title=Mine")
    assert [path.name for path in tmp_path.iterdir()] == ["my report, the=second"]
    page = (tmp_path / "my report, the=second" / "report.html").read_text(encoding="utf-8")
    assert "<h1>Mine</h1>" in page
    assert "out=my report, the=second" in page  # the command, as it was typed
    assert capsys.readouterr().out.splitlines()[-1] == "my report, the=second/report.html"


def test_a_list_of_folders_and_a_reference(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_run(tmp_path / "other", config(1.0, 3, "proportional"), blocks=2)
    link = tmp_path / "first"
    link.symlink_to(run_dir)
    argv = [f"runs=[{link},{other}]", f"out={tmp_path}/out", "reference.perplexity={wikitext2: 33, imdb: 45}"]
    call(monkeypatch, *argv, "reference.name=Q4_1", "reference.bytes=98000000")
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| Q4\\_1 | - | - | 98.0 MB | - | 33.00 | - | 45.00 |" in table


def test_a_real_run_is_reported(tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["experiment=tiny", f"data.train.path={tiny_text}", f"run_dir={tmp_path}/run", "trainer.max_steps=4"]
    monkeypatch.setattr(sys, "argv", ["usllm-train", *argv, "~callbacks.progress"])
    train.main()
    call(monkeypatch, f"runs={tmp_path}/run", f"out={tmp_path}/out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "1 run: 1 finished." in page
    assert {path.name for path in (tmp_path / "out").glob("*.png")} >= {
        "perplexity_by_rate_validation_window_32.png",
        "training_curves.png",
        "layers_error.png",
    }


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["runs=/no/such/folder"], "runs=/no/such/folder: no such folder"),
        (["runs={empty}"], "holds no run of usllm-train"),
        ([], "runs: needs a value"),
        (["runs={run}", "reference.perplexity=33"], "2 test sets (imdb, wikitext2)"),
        (["runs={run}", "out={run}/report.json"], "is a file"),
    ],
)
def test_bad_input_ends_in_one_message(
    argv: list[str],
    named: str,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *(argument.format(empty=empty, run=run_dir) for argument in argv))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_help_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, usllm.cli.report; print(*sorted({'torch', 'matplotlib', 'wandb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
