"""A disk that runs full at any write of any command: one line, status 1, and no file that is not whole."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome, command
from synthetic import config, write_run

from usllm.training import load_checkpoint

Before = Callable[[], None]


class FullAtFlush:
    """The disk has no room for the file that is flushed to it at the ``calls``-th time; every writer of usllm does so.

    Args:
        calls: At which; 0 never. How many there were is left in ``file``.
    """

    def __init__(self, calls: int, file: Path) -> None:
        self.calls, self.file = calls, file

    def __call__(self) -> None:
        flush, made, file = os.fsync, [0], self.file.open("w")

        def full(descriptor: int) -> None:
            made[0] += 1
            file.seek(0)
            print(made[0], file=file, flush=True)
            if made[0] == self.calls:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(descriptor)

        os.fsync = full


class FullAbove:
    """No file may grow beyond ``size`` bytes, as if the disk had no more to give: also those that libraries write."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture(scope="module")
def home(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, what was packed of it, and runs to report."""
    folder = tmp_path_factory.mktemp("home")
    train = ["experiment=tiny", f"data.train.path={tiny_text}", f"run_dir={folder}/run", "~callbacks.progress"]
    assert command("train", *train, folder=folder).status == 0
    assert command("export", f"ckpt={folder}/run", f"out={folder}/packed", folder=folder).status == 0
    write_run(folder / "reported" / "a", config(0.5, 1, "waterfill"), blocks=2)
    write_run(folder / "reported" / "b", config(1.0, 3, "uniform"), blocks=2)
    return folder


COMMANDS: dict[str, tuple[str, list[str]]] = {
    "train": (
        "train",
        ["experiment=tiny", "data.train.path={text}", "run_dir={out}/run", "~callbacks.progress"],
    ),
    "eval": ("eval", ["ckpt={home}/run", "run_dir={out}/eval", "evaluation.max_windows=1"]),
    "export": ("export", ["ckpt={home}/run", "out={out}/packed"]),
    "inspect": ("inspect", ["model={home}/packed", "json={out}/account.json"]),
    "report": ("report", ["runs={home}/reported", "out={out}/report"]),
}


def run(name: str, home: Path, text: Path, out: Path, before: Before) -> Outcome:
    program, arguments = COMMANDS[name]
    given = [argument.format(home=home, text=text, out=out) for argument in arguments]
    return command(program, *given, folder=out, before=before)


def check(name: str, outcome: Outcome, out: Path) -> None:
    """What a command may leave that may have met a full disk.

    Raises:
        AssertionError: it ended otherwise than well or with status 1 and one line, or left a file that is not whole.
    """
    assert "Traceback" not in outcome.output, outcome.output
    errors = [line for line in outcome.output.splitlines() if "error:" in line]
    assert outcome.status in (0, 1), outcome.output
    assert len(errors) == outcome.status, outcome.output
    assert all(line.startswith(f"usllm-{name}: error:") for line in errors)
    assert not [path for path in out.rglob(".*") if path.suffix[1:].isdigit() or path.suffix == ".partial"]
    for path in out.rglob("*.json"):
        json.loads(path.read_text())
    for path in out.rglob("*.ckpt"):
        load_checkpoint(path)


def files(folder: Path) -> dict[str, bytes]:
    """All that a reader would find, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_report_on_a_full_disk_leaves_the_old_one_or_none(home: Path, tiny_text: Path, tmp_path: Path) -> None:
    assert run("report", home, tiny_text, tmp_path, FullAtFlush(0, tmp_path / "calls")).status == 0
    before, flushes = files(tmp_path / "report"), int((tmp_path / "calls").read_text())
    assert {Path(name).suffix for name in before} == {".png", ".svg", ".md", ".html"}
    outcome = run("report", home, tiny_text, tmp_path, FullAtFlush(flushes // 3, tmp_path / "calls"))
    assert outcome.status == 1
    check("report", outcome, tmp_path)
    assert files(tmp_path / "report") == before
    outcome = run("report", home, tiny_text, tmp_path / "new", FullAbove(max(map(len, before.values())) - 1))
    assert outcome.status == 1
    check("report", outcome, tmp_path / "new")
    assert files(tmp_path / "new" / "report") == {}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("name", COMMANDS)
def test_disk_that_is_full_at_any_flush(name: str, part: int, home: Path, tiny_text: Path, tmp_path: Path) -> None:
    whole = run(name, home, tiny_text, tmp_path / "whole", FullAtFlush(0, tmp_path / "calls"))
    assert whole.status == 0, whole.output
    calls = 1 + random.Random(part).randrange(int((tmp_path / "calls").read_text()))
    outcome = run(name, home, tiny_text, tmp_path / "full", FullAtFlush(calls, tmp_path / "calls"))
    check(name, outcome, tmp_path / "full")


@pytest.mark.slow
@pytest.mark.parametrize("size", [10_000, 20_000, 60_000, 200_000, 600_000])
@pytest.mark.parametrize("name", COMMANDS)
def test_disk_without_room_for_large_files(name: str, size: int, home: Path, tiny_text: Path, tmp_path: Path) -> None:
    check(name, run(name, home, tiny_text, tmp_path, FullAbove(size)), tmp_path)
