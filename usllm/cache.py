"""A folder for things that are slow to make, published whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """Folder of everything usllm keeps between runs: ``$USLLM_CACHE``, else ``~/.cache/usllm``."""
    return Path(os.environ.get("USLLM_CACHE") or "~/.cache/usllm").expanduser()


def published(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return ``folder``, made by ``build(empty_folder)`` if it is not there yet.

    ``build`` fills a temporary neighbour that is renamed when complete, so a killed process leaves no half-written
    entry and of several processes that build the same entry at once the first one wins; the others drop their copy.
    The content of an entry must therefore depend on its name alone.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        build(scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private; a shared cache is meant to be read by others
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
