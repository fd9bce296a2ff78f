"""The name of every file and folder in the directory of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REPORT_FILE = "report.json"
FAILURE_FILE = "failure.json"
WINDOWS_FILE = "windows.json"
"""Mean losses of the windows that were measured, by test set and stage: for intervals, and pairs with other runs."""
STAGES_FOLDER = "stages"
CHECKPOINT_FOLDER = "checkpoints"
PACKED_FOLDER = "packed"
"""What a run with ``block_by_block=true`` ends with."""


def found_file(stages_folder: Path, stage: str) -> Path:
    """Where a run keeps the rows that a stage reports."""
    return stages_folder / stage / "found.json"


def found_by_stages(run_dir: Path) -> dict[str, Any]:
    """The rows that the stages of a run have reported, by stage; a file that cannot be read is left out."""
    found = {}
    for path in sorted(run_dir.glob(f"{STAGES_FOLDER}/*/found.json")):
        try:
            found[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def checkpoint_folder(run_dir: Path) -> Path:
    """Where the run keeps its checkpoints."""
    return run_dir / CHECKPOINT_FOLDER
