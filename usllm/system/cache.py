"""A folder for things that are slow to make, published whole or not at all, and made by one process at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from usllm.system.files import expanded, settle_folder
from usllm.system.forks import closed_in_forks

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

_MODE = 0o755  # mkdtemp makes folders private; a shared cache is meant to be read by others


def cache_root() -> Path:
    """Folder of everything usllm keeps between runs: ``$USLLM_CACHE``, else ``~/.cache/usllm``."""
    return expanded(os.environ.get("USLLM_CACHE") or "~/.cache/usllm")


def published(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return ``folder``, made by ``build(empty_folder)`` if it is not there yet.

    ``build`` fills a temporary neighbour that is renamed when complete, so a killed process leaves no half-written
    entry. Of several processes that want the same entry one builds it and the others wait for it. Where the file
    system has no locks they all build, the first one wins and the others drop their copy. The content of an entry must
    therefore depend on its name alone.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone_with(folder):
        if folder.is_dir():
            return folder
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
        try:
            build(scratch)
            settle_folder(scratch, _MODE)
            scratch.chmod(_MODE)
            try:
                scratch.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextlib.contextmanager
def alone_with(entry: Path) -> Iterator[None]:
    """Wait until no other thread or process is in this block for ``entry``, a path in a folder that is there.

    The system frees the lock of a process that dies. Where the file system has no locks, nobody waits.
    """
    if fcntl is None:
        yield
        return
    path = entry.with_name(f".{entry.name}.lock")
    file: IO[bytes] | None = None
    try:
        while True:
            file = path.open("ab")
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                break
            file.close()  # the holder before us removed this file: a newer one may be locked
    except OSError:  # a file system without locks, or another user's lock file: build without one
        if file is not None:
            file.close()
        yield
        return
    with file, closed_in_forks(file):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
