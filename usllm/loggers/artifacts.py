"""Folders, such as packed exports, as artifacts of a W&B run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from usllm.loggers.wandb_run import WandbRunLogger
from usllm.system.errors import UserError
from usllm.system.files import read_json
from usllm.system.run_files import REPORT_FILE


def log_folder(
    loggers: Iterable[Logger], folder: Path, kind: str = "packed-model", metadata: Mapping[str, Any] | None = None
) -> None:
    """Log all files of a folder as one artifact, named after kind and run, with each logger of W&B.

    Args:
        kind: type of the artifact.
        metadata: plain Python, shown beside it.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder to log as an artifact")
    for logger in loggers:
        if isinstance(logger, WandbLogger) and not getattr(logger, "disabled", False):
            import wandb

            run = logger.experiment
            name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{kind}-{run.id}")
            artifact = wandb.Artifact(name, type=kind, metadata=dict(metadata or {}))
            artifact.add_dir(str(folder))
            run.log_artifact(artifact)


def attach_folder(run_dir: Path, folder: Path, kind: str = "packed-model") -> None:
    """Log a folder as an artifact of the finished run in ``run_dir``, which is opened again for it.

    Raises:
        UserError: the run has not ended, or was not logged to W&B.
    """
    report = read_json(run_dir / REPORT_FILE)
    if report is None:
        raise UserError(f"{run_dir} holds no {REPORT_FILE}: only a finished run can be opened again")
    node = dict(((report["config"].get("logger") or {}).get("wandb")) or {})
    if node.pop("_target_", None) is None:
        raise UserError(f"{run_dir} was not logged to Weights & Biases (logger=wandb)")
    logger = WandbRunLogger(**{**node, "save_dir": str(run_dir), "log_model": False})
    try:
        log_folder([logger], folder, kind)
    finally:
        logger.finish()
