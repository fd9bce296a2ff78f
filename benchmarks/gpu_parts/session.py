"""What a part sees of the run: its time, its options, and where its results go."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.results import FAILED, OK, Refused, Results

_LONGEST_ERROR = 6000  # characters of a traceback that are kept, from its end


class CardLost(Exception):
    """An error of CUDA that every later call of this process would meet again: a new process has to go on."""


@dataclass
class Session:
    """One process of one part.

    Attributes:
        results: Where results go.
        part: Name of the part.
        call: Number of the runner's call.
        end: When the part's time is over, on :func:`time.monotonic`.
        dry_run: Whether everything is small and on the CPU.
        worker, workers: Which of how many processes this is.
        options: Of the command line.
        running: File that names what is being measured, for the runner.
        unmet: Keys that failed or had no time.
    """

    results: Results
    part: str
    call: int
    end: float
    dry_run: bool
    worker: int
    workers: int
    options: Mapping[str, Any]
    running: Path
    unmet: list[str] = field(default_factory=list)
    _current: str = ""

    def remaining(self) -> float:
        """Seconds of the part's time that are left."""
        return self.end - time.monotonic()

    def wanted(self, key: str) -> bool:
        """Whether a key is still to be measured: it never went well, and was not tried in this call."""
        if (self.part, key) in self.results.good():
            return False
        tried = self.results.newest().get((self.part, key))
        if tried is not None and tried.get("call") == self.call:
            self.unmet.append(key)
            return False
        return True

    def begin(self, key: str) -> None:
        """Tell the runner what is being measured from now on."""
        self._current = key
        self.running.write_text(key, encoding="utf-8")

    def measure(self, key: str, work: Callable[[], Mapping[str, Any]], least: float = 1.0) -> None:
        """Measure something once, and write what came of it.

        Args:
            key: Name of the result within the part.
            work: Gives the values; what it raises becomes the result.
            least: Seconds below which it is not begun.

        Raises:
            CardLost: The card takes no more calls from this process.
        """
        if not self.wanted(key):
            return
        if self.remaining() < least:
            self.unmet.append(key)
            return
        self.begin(key)
        started = time.monotonic()
        try:
            values = work()
        except Exception as error:  # whatever it is, it is a result
            self.fail(key, error)
            return
        self.write(key, OK, seconds=round(time.monotonic() - started, 3), **values)

    def fail(self, key: str, error: BaseException) -> None:
        """Write an error as the result of a key.

        Raises:
            CardLost: See :meth:`measure`.
        """
        self.unmet.append(key)
        text = str(error) if isinstance(error, Refused) else "".join(traceback.format_exception(error))
        self.write(key, FAILED, error=text[-_LONGEST_ERROR:])
        if is_lost(error):
            raise CardLost(key) from error

    def write(self, key: str, status: str, **values: Any) -> None:
        """Write a line, and show its beginning."""
        self.results.append(self.part, key, status, call=self.call, **values)
        if key == self._current:
            self.begin("")  # what happens from now on is not its doing
        shown = {name: value for name, value in values.items() if name != "error"}
        shown |= {"error": str(values["error"]).strip().splitlines()[-1]} if values.get("error") else {}
        print(f"{self.part:12} {key:44} {status:7} {_short(shown)}", file=sys.__stdout__, flush=True)


def is_lost(error: BaseException | None) -> bool:
    """Whether an error of CUDA (an illegal address, say) has taken the process's card away."""
    seen = 0
    while error is not None and seen < 10:
        text, name = str(error), type(error).__name__
        if "CUDA error" in text or name == "AcceleratorError" or "device-side assert" in text:
            return "out of memory" not in text
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def _short(values: Mapping[str, Any]) -> str:
    parts = [f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()]
    return " ".join(parts)[:160]
