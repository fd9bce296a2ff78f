"""Part (a): the tests marked ``cuda``, a few of one function to a result, in several processes at a time.

Most of the time goes into compiling kernels, so the tests of a function are dealt out to the workers in handfuls. What
went well in an earlier call is left out; a handful whose process died or hung is passed over by the next one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_parts.results import FAILED, OK
from benchmarks.gpu_parts.session import CardLost, Session

TESTS = Path(__file__).parents[2] / "tests" / "kernels"
OF_DRY_RUN = 1  # tests of each function: the interpreter is slow
HANDFUL = 6  # tests of one result: neighbours, which use the same kernels
_MOST_FAILURES = 3  # of one result whose messages are kept
_LONGEST = 2000  # characters of one message
_LEAST_SECONDS = 1.0
_LOST = ("CUDA error", "device-side assert")


class Recorder:
    """A plugin of pytest that leaves out what is done, and writes a line for each handful of tests.

    Attributes:
        lost: Whether a test took the card away from the process.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.lost = False
        self._keys: dict[str, str] = {}
        self._key = ""
        self._began = time.monotonic()
        self._counts: dict[str, int] = {}
        self._failures: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep this worker's handfuls that are still wanted; dealt out one by one, as neighbours take alike long."""
        session = self.session
        by_key = handfuls(items, OF_DRY_RUN if session.dry_run else None)
        own = [key for key in list(by_key)[session.worker :: session.workers] if session.wanted(key)]
        items[:] = [item for key in own for item in by_key[key]]
        self._keys = {item.nodeid: key for key in own for item in by_key[key]}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a result as well."""
        if report.failed and self.session.worker == 0:
            self.session.unmet.append(report.nodeid)
            self.session.write(report.nodeid, FAILED, error=str(report.longrepr)[-_LONGEST:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Go on to the next test, or stop where no time is left or the card was lost."""
        key = self._keys[nodeid]
        if self.lost:
            pytest.exit("the card was lost")
        if key != self._key:
            self.finish()
            if self.session.remaining() < _LEAST_SECONDS:
                self.session.unmet.append(key)
                pytest.exit("no time is left")
            self._key, self._began = key, time.monotonic()
        self.session.begin(key)  # each test anew: patience is with one of them

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count what came of each test; an error of its set-up is a failure."""
        if report.when == "call" or not report.passed:
            self._counts[report.outcome] = self._counts.get(report.outcome, 0) + 1
        if report.failed:
            text = str(report.longrepr)
            self.lost = self.lost or any(sign in text for sign in _LOST)
            if len(self._failures) < _MOST_FAILURES:
                self._failures.append(f"{report.nodeid}\n{text[-_LONGEST:]}")

    def finish(self) -> None:
        """Write the handful that has ended, if one has."""
        if not self._counts:
            return
        values: dict[str, Any] = {**self._counts, "seconds": round(time.monotonic() - self._began, 2)}
        if self._failures:
            self.session.unmet.append(self._key)
            self.session.write(self._key, FAILED, **values, error="\n".join(self._failures))
        else:
            self.session.write(self._key, OK, **values)
        self._counts, self._failures = {}, []


def handfuls(items: list[pytest.Item], most: int | None = None) -> dict[str, list[pytest.Item]]:
    """Tests by the key of their result; at most ``most`` of each function."""
    of_function: dict[str, list[pytest.Item]] = {}
    for item in items:
        of_function.setdefault(function_of(item.nodeid), []).append(item)
    found = {}
    for name, tests in of_function.items():
        tests = tests[:most]
        for first in range(0, len(tests), HANDFUL):
            key = name if len(tests) <= HANDFUL else f"{name} {first // HANDFUL + 1}"
            found[key] = tests[first : first + HANDFUL]
    return found


def function_of(nodeid: str) -> str:
    """File and function of a test, without the parameters."""
    return nodeid.split("[")[0].rpartition("tests/kernels/")[2]


def run(session: Session) -> None:
    """Run this worker's tests.

    Raises:
        CardLost: A test took the card away; a new process has to go on.
    """
    os.environ["USLLM_CACHE"] = str(session.running.parent / "cache")
    recorder = Recorder(session)
    arguments = [str(TESTS), "-m", "cuda and not slow", "-q", "--tb=short", "-p", "no:cacheprovider"]
    # Output of the tests is kept apart from ours, which goes to the screen; pytest's own goes where errors go.
    arguments += ["--capture=sys", "-o", "addopts=--strict-markers --import-mode=importlib"]
    with contextlib.redirect_stdout(sys.stderr):
        pytest.main(arguments, plugins=[recorder])
    recorder.finish()
    if recorder.lost:
        raise CardLost("a test")
