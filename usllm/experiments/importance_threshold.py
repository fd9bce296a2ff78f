"""Which channels may be dropped: perplexity against a threshold on E[a²], without training.

Two curves: the dense model with the weights of the channels below the threshold zeroed, which shows the sensitivity
alone, and the sketched model in which these channels get no states and the others share their bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from usllm.compress import allocate_, compressed_layers
from usllm.compress.methods.sketch import SketchPlan
from usllm.config import TrainConfig, check_train, plain_config, sketch_config
from usllm.experiments.inputs import check_sequences, importance_of, model_of, study_settings, text_of
from usllm.experiments.results import kept_result, new_picture, save_picture, write_result
from usllm.runs.inputs import token_streams
from usllm.runs.measure import measure
from usllm.runs.report import measured_tokens
from usllm.system.errors import UserError
from usllm.system.machine import machine
from usllm.system.text import perplexity_text

FILE = "importance_threshold.json"
STAGES = ("zeroed", "sketched")


@dataclass(frozen=True)
class ImportanceThreshold:
    """Settings of the study.

    Attributes:
        name: ``importance_threshold``.
        thresholds: values of ``allocation.min_importance``: E[a²] of a channel over its layer's mean.
        sequences: calibration sequences.
    """

    name: str
    thresholds: list[float] = field(default_factory=lambda: [0.0, 0.01, 0.03, 0.1, 0.3, 1.0])
    sequences: int = 32

    def __post_init__(self) -> None:
        check_sequences(self.sequences)
        usable = all(isfinite(value) and value >= 0 for value in self.thresholds)
        if not self.thresholds or not usable or sorted(set(self.thresholds)) != self.thresholds:
            raise UserError(f"study.thresholds={self.thresholds}: give rising numbers from 0, such as [0, 0.1, 1]")


def run(cfg: DictConfig, study: dict[str, Any], command: str) -> dict[str, Any]:
    """Measure both curves; writes ``importance_threshold.json`` (after every point) and ``.png``, prints a table.

    Raises:
        UserError: The configuration, the model or the text has a problem, or the directory is in use.
    """
    config, plain, settings = check_train(cfg), plain_config(cfg), study_settings(ImportanceThreshold, study)
    result = kept_result(config, plain, FILE) or {"finished": False, "command": command, "rows": []}
    if not result["finished"]:
        _complete(config, settings, result, partial(write_result, config, plain, FILE, result))
        result |= {"finished": True, "machine": machine()}
        _draw(result["rows"], Path(config.run_dir) / "importance_threshold.png")
        write_result(config, plain, FILE, result)
    console = Console()
    console.print(_table(result["rows"]))
    console.print(f"result: {config.run_dir}/{FILE}, picture beside it", soft_wrap=True, markup=False)
    return result


def kept_channels(importance: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Channels that a plan may give states, bool [in] by layer: E[a²] at or above ``threshold`` times the mean."""
    return {name: values.double() >= threshold * values.double().mean() for name, values in importance.items()}


@contextmanager
def zeroed(model: nn.Module, kept: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the latent weights of all channels that are not ``kept`` are zero; afterwards as before."""
    saved = {}
    with torch.no_grad():
        for name, layer in compressed_layers(model).items():
            dropped = (~kept[name]).nonzero().flatten().to(layer.weight.device)
            saved[name] = (dropped, layer.weight[:, dropped].clone())
            layer.weight[:, dropped] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for name, layer in compressed_layers(model).items():
                dropped, weights = saved[name]
                layer.weight[:, dropped] = weights


def _complete(
    config: TrainConfig, settings: ImportanceThreshold, result: dict[str, Any], save: Callable[[], None]
) -> None:
    """Measure the points that ``result`` lacks."""
    tokenizer, data = text_of(config)
    streams = token_streams(config.evaluation, tokenizer, data)
    model = model_of(config)
    importance = importance_of(config, model, data, settings.sequences)
    rows = {row["threshold"]: row for row in result["rows"]}
    for threshold in settings.thresholds:
        if threshold not in rows:
            rows[threshold] = _shares(importance, threshold) | {"perplexity": {}}
    result["rows"] = [rows[threshold] for threshold in settings.thresholds]

    def point(row: dict[str, Any], stage: str) -> None:
        title = f"threshold {row['threshold']:g}, {stage}"
        found = measure(model, tokenizer, streams, config.evaluation, title)
        row["perplexity"][stage] = {f"{line['test_set']}/{line['window']}": line["perplexity"] for line in found}
        row["tokens"] = {f"{line['test_set']}/{line['window']}": measured_tokens(line) for line in found}
        save()

    # All dense points first: once a plan is set, the layers compute with it.
    for row in result["rows"]:
        if "zeroed" not in row["perplexity"]:
            with zeroed(model, kept_channels(importance, row["threshold"])):
                point(row, "zeroed")
    for row in result["rows"]:
        if "sketched" not in row["perplexity"]:
            sketch = dataclasses.replace(sketch_config(config), min_importance=row["threshold"])
            allocate_(model, sketch, importance)
            row["channels_with_states"] = _with_states(model)
            point(row, "sketched")


def _shares(importance: Mapping[str, Tensor], threshold: float) -> dict[str, Any]:
    """Shares of the channels and, as a mean over layers, of the activation energy that are kept."""
    kept = kept_channels(importance, threshold)
    energy = [float(values.double()[kept[name]].sum() / values.double().sum()) for name, values in importance.items()]
    return {
        "threshold": threshold,
        "channels_kept": sum(int(mask.sum()) for mask in kept.values()) / sum(len(mask) for mask in kept.values()),
        "energy_kept": sum(energy) / len(energy),
    }


def _with_states(model: nn.Module) -> float:
    """Share of the channels that hold states."""
    plans = [layer.plan for layer in compressed_layers(model).values() if isinstance(layer.plan, SketchPlan)]
    return sum(plan.num_active for plan in plans) / sum(plan.shape[1] for plan in plans)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=escape("Perplexity against the E[a²] threshold, untrained"), title_justify="left")
    for heading in ("threshold", "channels kept", "energy kept", "with states"):
        table.add_column(heading, justify="right")
    sets = list(rows[0]["perplexity"][STAGES[0]])
    for name in sets:
        for stage in STAGES:
            table.add_column(escape(f"{name}\n{stage}"), justify="right", no_wrap=True)
    for row in rows:
        shares = [f"{row[key]:.1%}" for key in ("channels_kept", "energy_kept", "channels_with_states")]
        figures = [perplexity_text(row["perplexity"][stage][name]) for name in sets for stage in STAGES]
        table.add_row(f"{row['threshold']:g}", *shares, *figures)
    return table


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = new_picture(["Perplexity without training", "What the threshold keeps"])
    thresholds = [row["threshold"] for row in rows]
    for name in rows[0]["perplexity"][STAGES[0]]:
        for stage, style in zip(STAGES, ("o-", "s--"), strict=True):
            left.plot(thresholds, [row["perplexity"][stage][name] for row in rows], style, label=f"{name}, {stage}")
    for key, label in (
        ("channels_kept", "channels kept"),
        ("energy_kept", "energy Σ E[a²] kept"),
        ("channels_with_states", "channels with states"),
    ):
        right.plot(thresholds, [100 * row[key] for row in rows], "o-", label=label)
    left.set(ylabel="perplexity", yscale="log")
    right.set(ylabel="%", ylim=(0, 105))
    for panel in (left, right):
        panel.set_xscale("symlog", linthresh=min((t for t in thresholds if t > 0), default=1.0))
        panel.set_xlim(left=0)
        panel.set_xlabel("threshold: E[a²] of a channel / mean of its layer")
        panel.legend()
    save_picture(figure, path)
