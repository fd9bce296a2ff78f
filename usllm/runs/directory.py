"""Run directories: named by what was asked for, refused when used, and written to atomically.

The names come from the command line's overrides, never from the clock, so that the same command with ``resume=true``
finds its run again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from usllm.system.errors import UserError
from usllm.system.files import read_json, write_json
from usllm.system.run_files import FAILURE_FILE, REPORT_FILE, checkpoint_folder

MAX_NAME_BYTES = 120  # far below the 255 that file systems allow: checkpoints and tables are named after it


def run_id(override_dirname: str) -> str:
    """A folder name for the overrides of a run: readable, unique, and short enough for every file system.

    It holds no ``=``, comma, bracket or quote, so that its path needs no quotes as a value on the command line.

    Args:
        override_dirname: Hydra's sorted overrides (``key-value`` joined by ``+``), without those that do not tell runs
            apart.

    Returns:
        ``default`` without overrides; else the overrides, with a hash appended where they had to be altered.
    """
    if not override_dirname:
        return "default"
    name = re.sub(r"[^A-Za-z0-9_.+-]", "_", override_dirname)[:MAX_NAME_BYTES].strip(".")
    if name == override_dirname:
        return name
    digest = hashlib.sha256(override_dirname.encode()).hexdigest()[:8]
    return f"{name}-{digest}"


def register_resolvers() -> None:
    """Make ``${usllm.run_id:...}`` known to OmegaConf; call before a configuration is composed."""
    OmegaConf.register_new_resolver("usllm.run_id", run_id, replace=True)


def finished_report(run_dir: Path) -> dict[str, Any] | None:
    """The report of a run that has ended, or ``None``."""
    report = read_json(run_dir / REPORT_FILE)
    return report if report and report.get("finished") else None


def refuse_used(run_dir: Path) -> None:
    """Keep a fresh run from mixing with an earlier one.

    Raises:
        UserError: The directory holds a checkpoint or the report of a finished run.
    """
    folder = checkpoint_folder(run_dir)
    if (folder.is_dir() and any(folder.glob("*.ckpt"))) or (run_dir / REPORT_FILE).exists():
        raise UserError(
            f"{run_dir} already holds a run: pass resume=true to continue it (a finished one prints its report), "
            "name=... for another folder, or delete it"
        )


@contextmanager
def noting_failure(run_dir: Path) -> Iterator[None]:
    """Leave ``failure.json`` in ``run_dir`` when the block raises an error, and none while it runs or once it is done.

    A report of several runs tells by it a run that failed from one that was interrupted (Ctrl-C, SIGTERM, SIGKILL),
    which leaves nothing.
    """
    path = run_dir / FAILURE_FILE
    path.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # a full disk, say: the error itself matters more
            write_json(path, {"error": type(error).__name__, "message": str(error)})
        raise
