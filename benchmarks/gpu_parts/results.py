"""Results as lines of JSON, written the moment they are there; the newest line of a key counts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

OK = "ok"
FAILED = "failed"
"""The measurement raised; ``error`` holds the traceback."""
HUNG = "hung"
"""It was ended because it ran past its time; ``error`` says where it was."""
CUT = "cut"
"""It ran when the time of its part was over; another call measures it."""
CRASHED = "crashed"
"""Its process died; ``error`` holds the end of what it wrote."""
COMPLETE = "complete"
"""Of a part: everything in it is ``ok``."""
INCOMPLETE = "incomplete"
"""Of a part: something failed, hung, crashed, or had no time; ``error`` says what."""


class Refused(Exception):
    """Something that the user can mend; the message is one line that names it and the way out."""


@dataclass(frozen=True)
class Results:
    """A file of results that several processes append to.

    Attributes:
        path: ``results.jsonl``.
    """

    path: Path

    def append(self, part: str, key: str, status: str, **values: Any) -> None:
        """Add one line, in one write, behind a line that a killed process may have left half written."""
        line = {"part": part, "key": key, "status": status, **values}
        line["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        text = json.dumps(line, ensure_ascii=False)
        with open(self.path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                text = text if file.read(1) == b"\n" else "\n" + text
            file.write((text + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines in order; halves of lines are passed over."""
        if not self.path.exists():
            return
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and {"part", "key", "status"} <= set(line):
                yield line

    def newest(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The newest line of every part and key; parts themselves have the key ``""``."""
        return {(line["part"], line["key"]): line for line in self.lines()}

    def good(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The newest good line of every part and key: what was measured once stays, though a later try failed."""
        return {(line["part"], line["key"]): line for line in self.lines() if line["status"] == OK}

    def is_complete(self, part: str) -> bool:
        """Whether nothing of a part is missing."""
        line = self.newest().get((part, ""))
        return line is not None and line["status"] == COMPLETE

    def last_call(self) -> int:
        """Number of the newest call of the runner; 0 before the first."""
        return max((int(line.get("call", 0)) for line in self.lines()), default=0)
