"""What studies leave in their directory: a JSON file, tables as CSV, a picture; never half a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usllm.config import TrainConfig
from usllm.system.errors import UserError
from usllm.system.files import read_json, replacing, write_json, write_text
from usllm.training.differences import agree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Where and how a study ran, not what it measured.
_FREE_KEYS = ("resume", "output_root", "run_dir")


def kept_result(config: TrainConfig, plain: Mapping[str, Any], file: str) -> dict[str, Any] | None:
    """What an earlier call of the same study left, where ``resume=true`` asks for it.

    Raises:
        UserError: There is a result and ``resume`` is false, or it was made under another configuration.
    """
    path = Path(config.run_dir) / file
    kept = read_json(path)
    if kept is None:
        return None
    if not config.resume:
        raise UserError(
            f"{path} already exists: pass resume=true to continue the study (a finished one prints its table), "
            "name=... for another folder, or delete it"
        )
    differences = _differences(kept.get("config") or {}, _identity(plain))
    if differences:
        raise UserError(
            f"{path} was made under another configuration: {'; '.join(differences)}. Restore these values, or take "
            "another name="
        )
    return kept


def write_result(config: TrainConfig, plain: Mapping[str, Any], file: str, content: dict[str, Any]) -> None:
    """Write a study's JSON file with the configuration that made it."""
    write_json(Path(config.run_dir) / file, {**content, "config": _identity(plain)})


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one table; all ``rows`` have the keys of the first."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def new_picture(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """An empty figure with one panel beside the other; drawn without a display."""
    from matplotlib.figure import Figure  # not pyplot: a Figure of its own draws with Agg and keeps no global state

    figure = Figure(figsize=(5.5 * len(titles), 4.2), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
        panel.grid(alpha=0.3)
    return figure, list(panels)


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _identity(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON gives it back, without what does not tell studies apart."""
    kept = {key: value for key, value in plain.items() if key not in _FREE_KEYS}
    loaded: dict[str, Any] = json.loads(json.dumps(_without_run_dir(kept, str(plain.get("run_dir")))))
    return loaded


def _without_run_dir(value: Any, run_dir: str) -> Any:
    """``value`` with the run's own folder, which other keys contain resolved, written as ``${run_dir}``."""
    if isinstance(value, Mapping):
        return {key: _without_run_dir(item, run_dir) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_run_dir(item, run_dir) for item in value]
    return value.replace(run_dir, "${run_dir}") if isinstance(value, str) else value


def _differences(theirs: Any, ours: Any, key: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = sorted(theirs.keys() | ours.keys())
        found = (_differences(theirs.get(n), ours.get(n), f"{key}.{n}" if key else n) for n in names)
        return [line for lines in found for line in lines]
    return [] if agree(key, theirs, ours) else [f"{key}: {theirs} there, {ours} here"]
