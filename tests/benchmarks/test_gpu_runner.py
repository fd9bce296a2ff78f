"""The machinery of ``benchmarks/gpu.py``: whatever a part does, the others run, results stay, and time is kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_parts import runner
from benchmarks.gpu_parts.results import COMPLETE, CRASHED, CUT, FAILED, HUNG, INCOMPLETE, OK, Refused, Results
from benchmarks.gpu_parts.schedule import ENVIRONMENT, FINETUNING, PARTS, Part, part_end
from benchmarks.gpu_parts.session import is_lost

GOOD = """
def run(session):
    session.measure("one", lambda: {"value": 1})
    session.measure("two", lambda: {"value": session.options["value"]})
"""
RAISES = """
def run(session):
    session.measure("before", lambda: {})
    session.measure("wrong", lambda: 1 / 0)
    session.measure("after", lambda: {})
"""
RAISES_OUTSIDE = """
import nothing_of_that_name
"""
HANGS = """
import threading
def run(session):
    session.measure("before", lambda: {})
    session.measure("hanging", lambda: threading.Event().wait())
    session.measure("after", lambda: {})
"""
DIES = """
import os, sys
def run(session):
    session.measure("before", lambda: {})
    session.measure("dying", lambda: (print("last words", file=sys.stderr, flush=True), os._exit(7)))
    session.measure("after", lambda: {})
"""
LOSES_THE_CARD = """
import os
def lose():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def run(session):
    session.measure("losing", lose)
    session.measure("after", lambda: {"process": os.getpid()})
"""
STARTS_ANOTHER = """
import subprocess, sys
from pathlib import Path
def run(session):
    def work():
        other = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
        Path(session.options["pid"]).write_text(str(other.pid))
        other.wait()
    session.measure("waiting", work)
"""
DIVIDED = """
def run(session):
    for number in range(session.worker, 6, session.workers):
        session.measure(f"item {number}", lambda: {"worker": session.worker})
"""
MINUTES = 0.5


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Parts by the source of their modules."""

    def make(name: str, source: str, **fields: Any) -> Part:
        (tmp_path / f"part_{name}.py").write_text(source, encoding="utf-8")
        return Part(name, f"part_{name}", fields.pop("share", 1.0), **fields)

    return make


def run(parts: list[Part], folder: Path, minutes: float = MINUTES, **fields: Any) -> int:
    return runner.run(parts, folder / "out", minutes, path=str(folder), options={"value": 2, **fields})


def results(folder: Path) -> Results:
    return Results(folder / "out" / runner.FILE)


def statuses(folder: Path) -> dict[tuple[str, str], str]:
    return {key: line["status"] for key, line in results(folder).newest().items() if key[0] != "call"}


def test_every_result_is_a_line(made: Any, tmp_path: Path) -> None:
    assert run([made("good", GOOD)], tmp_path) == 0
    assert statuses(tmp_path) == {("good", "one"): OK, ("good", "two"): OK, ("good", ""): COMPLETE}
    line = results(tmp_path).good()["good", "two"]
    assert line["value"] == 2 and line["date"] and line["seconds"] >= 0


def test_what_raises_leaves_its_traceback_and_the_rest_runs(made: Any, tmp_path: Path) -> None:
    assert run([made("raises", RAISES), made("good", GOOD)], tmp_path) == 1
    found = statuses(tmp_path)
    assert [found["raises", key] for key in ("before", "wrong", "after", "")] == [OK, FAILED, OK, INCOMPLETE]
    assert found["good", ""] == COMPLETE
    assert "ZeroDivisionError" in results(tmp_path).newest()["raises", "wrong"]["error"]


def test_a_part_that_cannot_be_imported(made: Any, tmp_path: Path) -> None:
    assert run([made("outside", RAISES_OUTSIDE), made("good", GOOD)], tmp_path) == 1
    line = results(tmp_path).newest()["outside", "worker 0"]
    assert line["status"] == FAILED and "nothing_of_that_name" in line["error"]
    assert statuses(tmp_path)["good", ""] == COMPLETE


@pytest.mark.slow
def test_what_hangs_past_its_patience_is_ended_and_the_rest_of_its_part_runs(made: Any, tmp_path: Path) -> None:
    assert run([made("hangs", HANGS, patience=4.0), made("good", GOOD)], tmp_path) == 1
    found = statuses(tmp_path)
    assert [found["hangs", key] for key in ("before", "hanging", "after", "")] == [OK, HUNG, OK, INCOMPLETE]
    assert found["good", ""] == COMPLETE
    error = results(tmp_path).newest()["hangs", "hanging"]["error"]
    assert "threading" in error and "part_hangs.py" in error  # where it was


@pytest.mark.slow
def test_a_part_that_hangs_past_its_share_leaves_time_for_the_next(made: Any, tmp_path: Path) -> None:
    minutes = 20.0 / 60  # a share is enough for a process to start on a machine that has other work
    started = time.monotonic()
    assert run([made("hangs", HANGS, share=0.4), made("good", GOOD, share=0.6)], tmp_path, minutes) == 1
    assert time.monotonic() - started <= 60 * minutes
    found = statuses(tmp_path)
    assert found["hangs", "hanging"] == CUT and ("hangs", "after") not in found
    assert found["good", ""] == COMPLETE


def test_a_process_that_dies_leaves_its_last_words(made: Any, tmp_path: Path) -> None:
    assert run([made("dies", DIES)], tmp_path) == 1
    found = statuses(tmp_path)
    assert [found["dies", key] for key in ("before", "dying", "after")] == [OK, CRASHED, OK]
    line = results(tmp_path).newest()["dies", "dying"]
    assert line["exit"] == 7 and "last words" in line["error"]


def test_a_lost_card_ends_the_process_and_another_goes_on(made: Any, tmp_path: Path) -> None:
    assert run([made("loses", LOSES_THE_CARD)], tmp_path) == 1
    found = statuses(tmp_path)
    assert (found["loses", "losing"], found["loses", "after"]) == (FAILED, OK)
    assert is_lost(RuntimeError("CUDA error: unspecified launch failure"))
    assert not is_lost(RuntimeError("CUDA out of memory"))


@pytest.mark.slow
def test_processes_that_a_part_started_end_with_it(made: Any, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    assert run([made("another", STARTS_ANOTHER, patience=6.0)], tmp_path, pid=str(pid)) == 1
    state = Path("/proc", pid.read_text(), "status")
    deadline = time.monotonic() + 5  # the kernel may be late with it
    while state.exists() and "zombie" not in state.read_text() and time.monotonic() < deadline:
        pass
    assert not state.exists() or "zombie" in state.read_text()


def test_a_second_call_does_what_is_missing(made: Any, tmp_path: Path) -> None:
    assert run([made("raises", RAISES), made("good", GOOD)], tmp_path) == 1
    before = list(results(tmp_path).lines())
    mended = RAISES.replace("1 / 0", "{'value': 3}")
    assert run([made("raises", mended), made("good", GOOD)], tmp_path) == 0
    added = list(results(tmp_path).lines())[len(before) :]
    assert [(line["part"], line["key"]) for line in added] == [("call", "2"), ("raises", "wrong"), ("raises", "")]
    assert run([made("raises", mended), made("good", GOOD)], tmp_path) == 0
    assert len(list(results(tmp_path).lines())) == len(before) + len(added) + 1


def test_half_a_line_is_passed_over(made: Any, tmp_path: Path) -> None:
    run([made("good", GOOD)], tmp_path)
    path = results(tmp_path).path
    path.write_bytes(path.read_bytes() + b'{"part": "good", "key": "th')
    results(tmp_path).append("good", "three", OK)
    assert ("good", "three") in results(tmp_path).good()
    assert ("good", "two") in results(tmp_path).good()


def test_workers_divide_a_part_up(made: Any, tmp_path: Path) -> None:
    assert run([made("divided", DIVIDED, workers=3)], tmp_path) == 0
    lines = [line for key, line in results(tmp_path).good().items() if key[0] == "divided"]
    assert {line["key"]: line["worker"] for line in lines} == {f"item {n}": n % 3 for n in range(6)}


def test_nothing_runs_behind_an_essential_part_that_fails(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """
from benchmarks.gpu_parts.results import Refused
def no():
    raise Refused("there is no card: get one")
def run(session):
    session.measure("machine", no)
"""
    assert run([made("first", source, essential=True), made("good", GOOD)], tmp_path) == 2
    assert ("good", "") not in statuses(tmp_path)
    assert capsys.readouterr().err == "there is no card: get one\n"


def test_without_time_nothing_begins_and_all_is_said(made: Any, tmp_path: Path) -> None:
    assert run([made("good", GOOD)], tmp_path, 1e-6) == 1
    assert statuses(tmp_path) == {("good", ""): INCOMPLETE}


def test_parts_get_their_shares_and_the_last_one_the_rest() -> None:
    parts = [ENVIRONMENT, *PARTS, FINETUNING]
    assert [part.name for part in parts][1:3] == ["correctness", "kernels"]
    now = 0.0
    for number in range(len(parts)):
        end = part_end(now, 540.0, parts[number:])
        assert end > now
        now = end
    assert now == 540.0
    assert part_end(0.0, 10.0, [Part("a", "a", 1.0), Part("b", "b", 4.0)]) == 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes=0.0 must be above 0"),
        (["--model", "somewhere"], "--model=somewhere and --tokens=None belong together"),
        (["--model", "nowhere", "--tokens", "nowhere.npy"], "--model=nowhere is not there: make it with"),
    ],
)
def test_a_command_line_that_cannot_be_run(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=message):
        runner.parse(["--out", str(tmp_path), *arguments])
