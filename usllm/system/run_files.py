"""The name of every file and folder in the directory of a run."""

from __future__ import annotations

from pathlib import Path

REPORT_FILE = "report.json"
FAILURE_FILE = "failure.json"
STAGES_FOLDER = "stages"
CHECKPOINT_FOLDER = "checkpoints"


def checkpoint_folder(run_dir: Path) -> Path:
    """Where the run keeps its checkpoints."""
    return run_dir / CHECKPOINT_FOLDER
