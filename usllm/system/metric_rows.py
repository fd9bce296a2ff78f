"""Metrics over the steps of a run in ``metrics.csv``: one row a step, and whole rows only, however the writer ends."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from usllm.system.files import naming, replacing

METRICS_FILE = "metrics.csv"
STEP = "step"
_PART = re.compile(r"version_(\d+)$")

Row = dict[str, str]


def part_folders(run_dir: Path) -> list[Path]:
    """Folders ``csv/version_<n>`` of a run, in the order they were begun.

    Today a run has one, however often it is resumed; older versions of usllm began another with each resume.
    """
    found = [(int(match[1]), path) for path in run_dir.glob("csv/version_*") if (match := _PART.search(path.name))]
    return [path for _, path in sorted(found)]


def read_rows(path: Path) -> list[Row]:
    """Rows of a file as text; a row that is cut off, because the run is writing or was killed, is left out.

    Raises:
        OSError: There is no such file, or it cannot be read.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [row for row in rows if None not in row and None not in row.values()]


def merged(rows: Iterable[Mapping[str, str]]) -> dict[int, Row]:
    """One row for each step, rising: what several rows say of one step, of which later ones count."""
    found: dict[int, Row] = {}
    for row in rows:
        if (step := _step(row.get(STEP))) is not None:
            found.setdefault(step, {}).update({name: value for name, value in row.items() if value})
    return dict(sorted(found.items()))


class MetricRows:
    """The file of a run that is being made.

    Values of one step are one row, at whatever times they are added. A row is appended whole; what is written already
    changes only by another file taking its place. So a kill costs at most the row that is being written.

    Args:
        path: The file; what is in it is continued.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] | None = None  # those of the file; None: it was not looked at yet
        self._last: tuple[int, Row] = (-1, {})
        self._waiting: dict[int, Row] = {}

    def keep_below(self, step: int, parts: Sequence[Path] = ()) -> None:
        """Drop the rows from ``step`` on: the run goes on there and will write them again.

        Args:
            step: First step that is to be written.
            parts: Later files of the same run, oldest first; their rows move into this one and they are deleted.
        """
        files = [path for path in (self.path, *parts) if path.is_file()]
        rows = merged(row for path in files for row in read_rows(path))
        self._write({number: row for number, row in rows.items() if number < step})
        for path in files:
            if path != self.path:
                path.unlink()

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values of a step; rows of the steps before it are written."""
        if any(number < step for number in self._waiting):
            self.save()
        self._waiting.setdefault(step, {}).update({name: _text(value) for name, value in values.items()})

    def save(self, to_disk: bool = False) -> None:
        """Write what was added.

        Args:
            to_disk: Wait until the disk has it, so that what is written after it never survives it.

        Raises:
            OSError: It cannot be written; the file is as it was, and what was added waits on.
        """
        if self._columns is None and self._waiting:
            self._write(merged(read_rows(self.path)) if self.path.is_file() else {})
        number, known = self._last
        if {**known, **self._waiting.get(number, {})} == known:
            self._waiting.pop(number, None)  # said before
        if not self._waiting:
            return
        new = {name for row in self._waiting.values() for name in row} - set(self._columns or ())
        if new or min(self._waiting) <= number:
            rows = read_rows(self.path) if self.path.is_file() else []
            waiting = [{STEP: str(step), **row} for step, row in self._waiting.items()]
            self._write(merged([*rows, *waiting]))
        else:
            self._append(to_disk)
        self._waiting = {}

    def _write(self, rows: Mapping[int, Row]) -> None:
        """Another file in the place of this one."""
        columns = sorted({STEP}.union(*rows.values()))
        if rows:
            with replacing(self.path) as file:
                file.write(_lines(columns, rows, header=True))
        else:
            self.path.unlink(missing_ok=True)
        self._columns = columns if rows else []
        self._last = max(rows.items(), default=(-1, {}))

    def _append(self, to_disk: bool) -> None:
        rows = dict(sorted(self._waiting.items()))
        with naming(self.path), open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            content = _lines(self._columns or [], rows, header=False)
            try:
                while content:
                    content = content[file.write(content) :]
                if to_disk:
                    os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise
        self._last = max(rows.items())


def _lines(columns: Sequence[str], rows: Mapping[int, Row], header: bool) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows({**row, STEP: str(step)} for step, row in rows.items())
    return text.getvalue().encode("utf-8")


def _text(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _step(value: str | None) -> int | None:
    try:
        return int(value or "")
    except ValueError:
        return None
