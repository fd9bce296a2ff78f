"""Reads every run below a folder: finished ones from their ``report.json``, others from what they have left so far."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from usllm.reports.curves import read_curves
from usllm.reports.labels import with_short_names
from usllm.reports.runs import FAILED, FINISHED, INTERRUPTED, RUNNING, Run, record
from usllm.system.errors import UserError
from usllm.system.files import expanded, read_json
from usllm.system.run_files import CHECKPOINT_FOLDER, FAILURE_FILE, REPORT_FILE, STAGES_FOLDER, found_by_stages

BASELINE_FILE = "baseline.json"  # usllm.runs.measure, which needs torch, writes it
LOCK_FILE = ".lock"  # usllm.system.lock, which needs lightning
HYDRA_FOLDER = ".hydra"
# Folders of a run that hold no runs; a large tree is walked quickly without them.
_CLOSED = {CHECKPOINT_FOLDER, STAGES_FOLDER, "csv", "wandb", HYDRA_FOLDER}
# Overrides that say where and how, not what, as in conf/hydra/usllm.yaml.
_PLACES = ("experiment", "name", "output_root", "resume", "run_dir")


def read_folder(folder: str | Path) -> list[Run]:
    """All runs below ``folder``, itself included, by path.

    Raises:
        UserError: There is no such folder, or no run in it.
    """
    root = expanded(folder)
    if not root.is_dir():
        raise UserError(f"runs={folder}: no such folder; give one that usllm-train wrote to, such as runs=runs/demo")
    root = root.resolve()
    runs = [read_run(path, path.relative_to(root.parent).as_posix()) for path in run_folders(root)]
    if not runs:
        raise UserError(
            f"runs={folder}: holds no run of usllm-train (no {REPORT_FILE}, {BASELINE_FILE} or {CHECKPOINT_FOLDER}/ in "
            "it or below it); give the folder of a run or of a sweep"
        )
    return with_short_names(runs)


def run_folders(root: Path) -> Iterator[Path]:
    """Folders of runs below ``root``, in the order of their names."""
    for path, folders, files in os.walk(root):
        if _is_run(Path(path), set(folders), set(files)):
            yield Path(path)
        folders[:] = sorted(set(folders) - _CLOSED)


def read_run(folder: Path, name: str) -> Run:
    """The run in ``folder``, whatever state it is in."""
    notes: list[str] = []
    report = _json(folder / REPORT_FILE, notes)
    failure = _json(folder / FAILURE_FILE, notes)
    if report.get("finished"):
        status = FINISHED
    elif failure:
        status = FAILED
        notes.append(f"failed with {failure.get('error')}: {failure.get('message')}")
    else:
        status = RUNNING if _locked(folder / LOCK_FILE) else INTERRUPTED
    if not report:
        report = {"perplexity": _baseline(_json(folder / BASELINE_FILE, notes)), "stages": found_by_stages(folder)}
    config = report.get("config") or _logged_config(folder) or _yaml(folder / HYDRA_FOLDER / "config.yaml")
    return record(
        name,
        str(folder),
        status,
        report,
        config if isinstance(config, Mapping) else {},
        overrides=_overrides(folder),
        curves=read_curves(folder),
        warnings=notes,
    )


def _is_run(path: Path, folders: set[str], files: set[str]) -> bool:
    if files & {REPORT_FILE, BASELINE_FILE, FAILURE_FILE}:
        return True
    if CHECKPOINT_FOLDER in folders and any((path / CHECKPOINT_FOLDER).glob("*.ckpt")):
        return True
    if "csv" in folders and any((path / "csv").glob("version_*/metrics.csv")):
        return True
    if HYDRA_FOLDER not in folders:
        return False
    # Started, and stopped before it wrote anything. A study has runs below it, an evaluation trains nothing.
    # One whose configuration was refused never took the directory's lock.
    config = _yaml(path / HYDRA_FOLDER / "config.yaml")
    started = LOCK_FILE in files and isinstance(config, Mapping) and "trainer" in config
    return started and not config.get("study")


def _baseline(stages: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a report, from what was measured before training began."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for stage, measured in stages.items():
        for row in measured if isinstance(measured, list) else []:
            key = tuple(row.get(part) for part in ("test_set", "window", "windows", "tokens", "window_start"))
            merged = rows.setdefault(key, {k: v for k, v in row.items() if k not in ("perplexity", "seconds")})
            merged[stage] = row.get("perplexity")
    return list(rows.values())


def _logged_config(folder: Path) -> Any:
    """The resolved configuration that the CSV logger keeps beside its metrics."""
    for path in sorted(folder.glob("csv/version_*/hparams.yaml"), reverse=True):
        if config := _yaml(path):
            return config
    return None


def _overrides(folder: Path) -> list[str]:
    """What was asked for: the command's overrides, or for a variant of a study what the study varies."""
    given = _yaml(folder / HYDRA_FOLDER / "overrides.yaml")
    if isinstance(given, list):
        return [str(entry) for entry in given if str(entry).lstrip("+~").partition("=")[0] not in _PLACES]
    study = _yaml(folder.parent / HYDRA_FOLDER / "config.yaml")
    variants = ((study.get("study") or {}) if isinstance(study, Mapping) else {}).get("variants") or {}
    return _flat(variants.get(folder.name)) if isinstance(variants, Mapping) else []


def _flat(values: Any, key: str = "") -> list[str]:
    if not isinstance(values, Mapping):
        return [f"{key}={values}"] if key else []
    return [line for name, value in values.items() for line in _flat(value, f"{key}.{name}" if key else str(name))]


def _locked(path: Path) -> bool:
    """Whether a process holds the run's directory (:func:`usllm.system.lock.sole_user`)."""
    try:
        import fcntl

        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # no locks here, or no such file
        return False
    return False


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return read_json(path) or {}
    except (UserError, OSError):
        notes.append(f"{path.name} cannot be read: it is damaged")
        return {}


def _yaml(path: Path) -> Any:
    """The content of a YAML file; ``None`` where there is none or it is damaged."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
