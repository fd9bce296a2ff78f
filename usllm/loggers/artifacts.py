"""Packed folders as artifacts of the W&B run that they were exported from (``logger.wandb.log_export``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from usllm.loggers.wandb_run import WandbRunLogger

KIND = "packed-model"


def logs_exports(config: Mapping[str, Any]) -> bool:
    """Whether the configuration of a run asks for its exports to be logged."""
    return bool(_node(config).get("log_export"))


def reopened(config: Mapping[str, Any], run_dir: Path) -> WandbRunLogger:
    """The W&B run of a run that has ended, to be continued by one artifact.

    Args:
        config: of the run.
        run_dir: its directory, which holds the id.

    Raises:
        UserError: online without a login.
    """
    settings = {key: value for key, value in _node(config).items() if key != "_target_"}
    tracker = WandbRunLogger(**{**settings, "save_dir": str(run_dir), "log_model": False})
    tracker.stores_code = False  # the version that trained stays
    return tracker


def log_export(tracker: WandbRunLogger, folder: Path, metadata: Mapping[str, Any]) -> str | None:
    """Log all files of a packed folder as one artifact, and end the run.

    Args:
        metadata: plain Python, shown beside it.

    Returns:
        The name of the artifact, a new version of it for each export; ``None`` where W&B is disabled.
    """
    if tracker.disabled:
        return None
    import wandb

    try:
        run = tracker.experiment
        artifact = wandb.Artifact(f"{KIND}-{run.id}", type=KIND, metadata=dict(metadata))
        artifact.add_dir(str(folder))
        run.log_artifact(artifact)
        return artifact.name
    finally:
        tracker.finish()


def _node(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict((config.get("logger") or {}).get("wandb") or {})
