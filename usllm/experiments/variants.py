"""Run one configuration in several variants, each a full run in a directory of its own, resumable like any run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from usllm.config import TrainConfig, check_train, plain_config
from usllm.runs.finetune import finetune
from usllm.system.errors import UserError
from usllm.system.metric_rows import METRICS_FILE, STEP, part_folders, read_rows

# Without these a run finetunes the dense model.
DENSE = {
    "stages": {"calibrate": None, "allocate": None, "start": None, "reconstruct": None},
    "callbacks": {"sketch_reprojection": None, "sketch_health": None},
}


def run_variants(cfg: DictConfig, variants: Mapping[str, Any], command: str) -> dict[str, dict[str, Any]]:
    """Finetune every variant; those that have ended are read back.

    Args:
        cfg: Composed configuration.
        variants: Overrides as nested dictionaries by variant name; ``dense: true`` among them finetunes dense.
        command: What the user typed, for the reports.

    Returns:
        The reports by variant name.

    Raises:
        UserError: With the problems of all variants, before any of them runs.
    """
    checked = {name: _variant(cfg, name, overrides) for name, overrides in variants.items()}
    return {name: finetune(config, plain, command, brief=True) for name, (config, plain) in checked.items()}


def metric_curve(run_dir: str | Path, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, from all parts of a run's CSV logs; of a step logged twice the later counts."""
    points: dict[int, float] = {}
    for path in (folder / METRICS_FILE for folder in part_folders(Path(run_dir))):
        for row in read_rows(path) if path.is_file() else ():
            if row.get(metric):
                points[int(row[STEP])] = float(row[metric])
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _variant(cfg: DictConfig, name: str, overrides: Any) -> tuple[TrainConfig, dict[str, Any]]:
    values = dict(overrides or {})
    dense = values.pop("dense", False)
    merged = OmegaConf.create(OmegaConf.to_container(cfg))
    OmegaConf.set_struct(merged, False)
    merged = OmegaConf.merge(merged, values, DENSE if dense else {})
    assert isinstance(merged, DictConfig)
    merged.run_dir = f"{cfg.run_dir}/{name}"
    merged.study = None
    try:
        return check_train(merged), plain_config(merged)
    except UserError as error:
        raise UserError(f"study.variants.{name}: {error}") from error
