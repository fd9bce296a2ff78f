"""Output error of each layer as sketched, before any training, by allocation (`docs/method.md` §4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from usllm.calibration import SecondMoments
from usllm.compress import compressed_layers
from usllm.config import TrainConfig, check_train, plain_config, sketch_config
from usllm.data.batches import model_inputs
from usllm.data.datamodule import Batch, TextDataModule
from usllm.eval.layer_error import rate_distortion_bound, relative_output_error
from usllm.experiments.inputs import check_sequences, model_of, precision_context, study_settings, text_of
from usllm.experiments.results import kept_result, new_picture, save_picture, write_csv, write_result
from usllm.sketch import SketchConfig, build_plan
from usllm.system.errors import UserError
from usllm.system.machine import machine
from usllm_kernels import project_query

FILE = "layer_error.json"
COLUMNS = (("uniform", 3), ("proportional", 1), ("proportional", 3), ("waterfill", 1), ("waterfill", 3))
"""Allocation and rows; each is measured without and with an output scale."""


@dataclass(frozen=True)
class LayerError:
    """Settings of the study.

    Attributes:
        name: ``layer_error``.
        rates: bits per weight.
        sequences: calibration sequences.
        shown: shell patterns over layer names that the table on the screen shows; where none fits, its first layers.
    """

    name: str
    rates: list[float] = field(default_factory=lambda: [0.5, 1.0])
    sequences: int = 16
    shown: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_sequences(self.sequences)
        if not self.rates or not all(isfinite(rate) and rate > 0 for rate in self.rates):
            raise UserError(f"study.rates={self.rates}: give numbers above 0, such as [0.5, 1.0]")


def run(cfg: DictConfig, study: dict[str, Any], command: str) -> dict[str, Any]:
    """Measure all layers; writes ``layer_error.json``, ``.csv`` and ``.png`` and prints a table for each rate.

    Raises:
        UserError: The configuration, the model or the text has a problem, or the directory is in use.
    """
    config, plain, settings = check_train(cfg), plain_config(cfg), study_settings(LayerError, study)
    result = kept_result(config, plain, FILE)
    if result is None:
        _, data = text_of(config)
        rows = _measured(config, settings, model_of(config), data)
        result = {
            "finished": True,
            "command": command,
            "rows": rows,
            "waterfill_lowest": {f"{rate:g}": waterfill_lowest(_at(rows, rate)) for rate in settings.rates},
            "machine": machine(),
        }
        folder = Path(config.run_dir)
        write_csv(folder / "layer_error.csv", rows)
        _draw(rows, settings.rates, folder / "layer_error.png")
        write_result(config, plain, FILE, result)
    console = Console()
    for rate in settings.rates:
        console.print(_table(_at(result["rows"], rate), rate, settings.shown))
        for line in _summary(result["waterfill_lowest"][f"{rate:g}"]):
            console.print(line)
    console.print(f"all layers: {config.run_dir}/layer_error.csv, picture beside it", soft_wrap=True, markup=False)
    return result


def column(allocation: str, rows: int, output_scale: bool) -> str:
    """Name of a column, such as ``waterfill_r1_scaled``."""
    return f"{allocation}_r{rows}{'_scaled' if output_scale else ''}"


def shared_inputs(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> dict[str, str]:
    """By layer, the first of the layers that read the same tensor (q for q, k and v; gate for gate and up).

    Args:
        model: run once on ``batch``.
        layers: layers by name.
        batch: ``input_ids`` int64 [sequences, context] on the model's device.

    Raises:
        UserError: A layer is not reached by the forward pass.
    """
    last: tuple[Tensor, str] | None = None
    first: dict[str, str] = {}
    handles = []
    for name, layer in layers.items():

        def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            nonlocal last
            if last is None or args[0] is not last[0]:  # held, so that no later tensor can be the same object
                last = (args[0], name)
            first[name] = last[1]

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            model(**model_inputs(batch), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in layers if name not in first]:
        raise UserError(f"{missing[0]} saw no input: leave it out of model.patterns")
    return first


def waterfill_lowest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """In how many layers ``waterfill`` has the lowest error, by rows and output scale, and overall.

    Args:
        rows: Of one rate.

    Returns:
        By combination: ``lowest`` and ``layers``, counts, and ``higher``, the names of the layers in which it is not.
    """
    found = {}
    for scaled in (False, True):
        for height in (*sorted({r for name, r in COLUMNS if name == "waterfill"}), None):
            label = f"{'any rows' if height is None else f'R={height}'}{', output scale' if scaled else ''}"
            columns = [(name, r) for name, r in COLUMNS if height in (None, r)]
            ours = [column(name, r, scaled) for name, r in columns if name == "waterfill"]
            others = [column(name, r, scaled) for name, r in columns if name != "waterfill"]
            higher = [row["layer"] for row in rows if min(row[c] for c in ours) > min(row[c] for c in others)]
            found[label] = {"lowest": len(rows) - len(higher), "layers": len(rows), "higher": higher}
    return found


def _measured(
    config: TrainConfig, settings: LayerError, model: PreTrainedModel, data: TextDataModule
) -> list[dict[str, Any]]:
    layers = compressed_layers(model)
    batches = list(data.calibration_batches(settings.sequences))
    first = shared_inputs(model, layers, {"input_ids": batches[0]["input_ids"][:1, :8].to(model.device)})
    moments = _moments(config, model, {name: layers[name] for name in set(first.values())}, batches)
    sketch = sketch_config(config)
    last_user = {source: name for name, source in first.items()}
    rows = []
    for name, layer in track(layers.items(), "Sketching layers", console=Console(stderr=True), transient=True):
        weight, moment = layer.weight.detach().float(), moments[first[name]]
        rows += [
            {"layer": name, "rate": rate, **_errors(name, weight, moment, sketch, rate)} for rate in settings.rates
        ]
        if last_user[first[name]] == name:
            del moments[first[name]]
    return rows


def _moments(
    config: TrainConfig, model: PreTrainedModel, layers: Mapping[str, nn.Module], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """E[a aᵀ] of the layers' inputs, fp32 [in, in]."""
    with torch.no_grad(), precision_context(config), SecondMoments(layers, full=True) as seen:
        for batch in track(list(batches), "Measuring moments", console=Console(stderr=True), transient=True):
            model(**model_inputs(batch, model.device), use_cache=False)
    try:
        return seen.full_mean()
    except ValueError as error:
        raise UserError(f"calibration: {error}") from error


def _errors(name: str, weight: Tensor, moment: Tensor, sketch: SketchConfig, rate: float) -> dict[str, float]:
    importance, energy = moment.diagonal(), weight.square().mean(0)
    found = {}
    for allocation, rows in COLUMNS:
        for scaled in (False, True):
            config = dataclasses.replace(
                sketch, bits_per_weight=rate, allocation=allocation, rows=rows, output_scale=scaled
            )
            try:
                plan = build_plan((weight.shape[0], weight.shape[1]), importance, config, name, weight_energy=energy)
            except ValueError as error:
                raise UserError(str(error)) from error
            _, decoded = project_query(weight, plan, importance)
            found[column(allocation, rows, scaled)] = relative_output_error(weight, decoded, moment)
    return found | {"bound": rate_distortion_bound(weight, moment, rate)}


def _at(rows: list[dict[str, Any]], rate: float) -> list[dict[str, Any]]:
    return [row for row in rows if row["rate"] == rate]


def short_name(layer: str) -> str:
    """``5.down`` for ``model.layers.5.mlp.down_proj``; a name without a number stays."""
    parts = layer.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return f"{numbers[0]}.{parts[-1].removesuffix('_proj')}" if numbers else layer


def _table(rows: list[dict[str, Any]], rate: float, shown: list[str]) -> Table:
    chosen = [row for row in rows if any(fnmatch(row["layer"], pattern) for pattern in shown)] or rows[:7]
    table = Table(
        title=f"Untrained relative output error at {rate:g} bits per weight",
        caption="without/with an output scale; 1.00 is as bad as a layer of zeros",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    for allocation, height in COLUMNS:
        heading = allocation.replace("proportional", "propor-\ntional")  # seven columns in 80 characters
        table.add_column(f"{heading}\nR={height}", justify="right", no_wrap=True)
    table.add_column("bound", justify="right")
    for row in chosen:
        pairs = [(row[column(name, height, False)], row[column(name, height, True)]) for name, height in COLUMNS]
        table.add_row(short_name(row["layer"]), *(f"{a:.2f}/{b:.2f}" for a, b in pairs), f"{row['bound']:.2f}")
    return table


def _summary(found: dict[str, Any]) -> list[str]:
    lines = []
    for label, counts in found.items():
        line = f"waterfill is lowest in {counts['lowest']} of {counts['layers']} layers ({label})"
        if names := [short_name(name) for name in counts["higher"]]:
            line += f"; not in {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
        lines.append(line)
    return lines


def _draw(rows: list[dict[str, Any]], rates: list[float], path: Path) -> None:
    figure, panels = new_picture([f"{rate:g} bits per weight" for rate in rates])
    for panel, rate in zip(panels, rates, strict=True):
        ordered = sorted(_at(rows, rate), key=lambda row: float(row["bound"]))
        for index, (allocation, height) in enumerate(COLUMNS):
            for scaled, style in ((False, "-"), (True, ":")):
                values = [row[column(allocation, height, scaled)] for row in ordered]
                label = f"{allocation} R={height}{', scaled' if scaled else ''}"
                panel.plot(values, style, lw=1, color=f"C{index}", label=label)
        panel.plot([row["bound"] for row in ordered], "k--", lw=1, label="rate-distortion bound")
        panel.set(xlabel="layers, by their bound", ylabel="tr(ΔΣΔᵀ) / tr(WΣWᵀ)", yscale="log")
    panels[-1].legend(fontsize="x-small", ncols=2)
    save_picture(figure, path)
