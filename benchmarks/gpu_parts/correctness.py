"""Part (a): the tests marked ``cuda``, one result for each test function, in several processes at a time.

Test functions are dealt out to the workers; those that went well in an earlier call are left out. A function whose
process died or hung is passed over by the next one.
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
OF_DRY_RUN = 2  # tests of each function: the interpreter is slow
_MOST_FAILURES = 3  # of one function whose messages are kept
_LONGEST = 2000  # characters of one message
_LEAST_SECONDS = 1.0
_LOST = ("CUDA error", "device-side assert")


class Recorder:
    """A plugin of pytest that leaves out what is done, and writes a line for each test function.

    Attributes:
        lost: Whether a test took the card away from the process.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.lost = False
        self._function = ""
        self._began = time.monotonic()
        self._counts: dict[str, int] = {}
        self._failures: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep this worker's functions that are still wanted; dealt out one by one, as neighbours take alike long."""
        session = self.session
        of_function: dict[str, list[pytest.Item]] = {}
        for item in items:
            of_function.setdefault(function_of(item.nodeid), []).append(item)
        most = OF_DRY_RUN if session.dry_run else len(items)
        own = list(of_function)[session.worker :: session.workers]
        items[:] = [item for name in own if session.wanted(name) for item in of_function[name][:most]]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a result as well."""
        if report.failed and self.session.worker == 0:
            self.session.unmet.append(report.nodeid)
            self.session.write(report.nodeid, FAILED, error=str(report.longrepr)[-_LONGEST:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Go on to the next function, or stop where no time is left or the card was lost."""
        name = function_of(nodeid)
        if self.lost:
            pytest.exit("the card was lost")
        if name == self._function:
            return
        self.finish()
        if self.session.remaining() < _LEAST_SECONDS:
            self.session.unmet.append(name)
            pytest.exit("no time is left")
        self._function, self._began = name, time.monotonic()
        self.session.begin(name)

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
        """Write the function that has ended, if one has."""
        if not self._counts:
            return
        values: dict[str, Any] = {**self._counts, "seconds": round(time.monotonic() - self._began, 2)}
        if self._failures:
            self.session.unmet.append(self._function)
            self.session.write(self._function, FAILED, **values, error="\n".join(self._failures))
        else:
            self.session.write(self._function, OK, **values)
        self._counts, self._failures = {}, []


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
        raise CardLost(recorder._function)
