"""Which code a run was made with."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from usllm.system.version import VERSION


@lru_cache(maxsize=1)
def code_version() -> dict[str, Any]:
    """Version of the package and, in a git checkout, ``commit`` and ``changed`` (tracked files differ from it)."""
    try:
        found: dict[str, Any] = {"usllm": version("usllm")}
    except PackageNotFoundError:
        found = {"usllm": VERSION}
    package = Path(__file__).parents[1]
    # Only a checkout of usllm itself: a wheel may be installed inside another project's repository.
    if (package.parent / ".git").exists() and (commit := _git(package, "rev-parse", "HEAD")) is not None:
        changes = _git(package, "status", "--porcelain", "--untracked-files=no")
        found |= {"commit": commit, "changed": bool(changes)}
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
