"""What forked processes are not to keep open: the loader's workers outlive a process that is killed, and so would its
locks, which belong to the open file and not to the process that took them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO, Any

_own: list[IO[Any]] = []


@contextlib.contextmanager
def closed_in_forks(file: IO[Any]) -> Iterator[None]:
    """Close ``file`` in every process that is forked from this one while the block runs."""
    _own.append(file)
    try:
        yield
    finally:
        _own.remove(file)


def _close() -> None:
    while _own:
        _own.pop().close()


if hasattr(os, "register_at_fork"):  # POSIX
    os.register_at_fork(after_in_child=_close)
