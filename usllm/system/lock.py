"""One process at a time in a run's directory."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from usllm.system.errors import RunError, UserError
from usllm.system.forks import closed_in_forks

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


@contextlib.contextmanager
def sole_user(run_dir: Path) -> Iterator[None]:
    """Hold the directory for the block; the system frees it when the process dies, however it dies.

    The file says who holds it and stays behind; only its lock counts, which forked processes do not share. Of a
    distributed run, rank 0 holds it for all. Where there are no locks (not POSIX, some network file systems) nothing is
    refused. Of a new run whose input is refused the file is taken away again: reports take it for one that has begun.

    Raises:
        UserError: another process holds it; names its process id, machine and the way out.
    """
    if fcntl is None or getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    new = not (run_dir / LOCK_FILE).exists()
    with open(run_dir / LOCK_FILE, "a+", encoding="utf-8") as file, closed_in_forks(file):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_dir} is in use by {_holder(run_dir)}: wait until it has ended, end it, or pass name=… for "
                "another folder"
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        try:
            yield
        except UserError as error:
            if new and not isinstance(error, RunError):
                (run_dir / LOCK_FILE).unlink(missing_ok=True)
            raise


def _holder(run_dir: Path) -> str:
    try:
        holder = json.loads((run_dir / LOCK_FILE).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just taken the lock, and writes
        return "another process"
