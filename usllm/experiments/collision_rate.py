"""How sketched weights collide, without training: occupancy and load of the states, by layer and by hash."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from usllm.compress import LayerReport, allocate_, compressed_layers, compression_report
from usllm.compress.methods.sketch import SketchPlan
from usllm.config import TrainConfig, check_train, plain_config, sketch_config
from usllm.experiments.inputs import check_sequences, importance_of, model_of, study_settings, text_of
from usllm.experiments.results import kept_result, new_picture, save_picture, write_csv, write_result
from usllm.sketch import Plan
from usllm.sketch.hash import HASHES
from usllm.system.errors import UserError
from usllm.system.machine import machine

FILE = "collision_rate.json"
UNOCCUPIED_LIMIT = 0.02
"""Highest acceptable share of states without a member (`docs/method.md` §2)."""


@dataclass(frozen=True)
class CollisionRate:
    """Settings of the study.

    Attributes:
        name: ``collision_rate``.
        hashes: hashes to compare.
        sequences: calibration sequences.
    """

    name: str
    hashes: list[str] = field(default_factory=lambda: ["balanced", "uniform"])
    sequences: int = 32

    def __post_init__(self) -> None:
        check_sequences(self.sequences)
        if not self.hashes or not set(self.hashes) <= set(HASHES):
            raise UserError(f"study.hashes={self.hashes}: give some of {', '.join(HASHES)}")


def run(cfg: DictConfig, study: dict[str, Any], command: str) -> dict[str, Any]:
    """Calibrate and plan with each hash; writes ``collision_rate.json``, ``.csv`` and ``.png`` and prints a table.

    Raises:
        UserError: The configuration, the model or the text has a problem, or the directory is in use.
    """
    config, plain, settings = check_train(cfg), plain_config(cfg), study_settings(CollisionRate, study)
    result = kept_result(config, plain, FILE)
    if result is None:
        result = _measured(config, settings) | {"command": command, "machine": machine()}
        folder = Path(config.run_dir)
        rows = [{"hash": name, **layer} for name, found in result["hashes"].items() for layer in found["layers"]]
        write_csv(folder / "collision_rate.csv", rows)
        _draw(result, folder / "collision_rate.png")
        write_result(config, plain, FILE, result)
    console = Console()
    console.print(_table(result))
    for name, found in result["hashes"].items():
        console.print(f"{name}: {found['bits_per_weight']:.4f} bits per weight, {found['unoccupied']:.3%} unoccupied")
    console.print(f"by layer: {config.run_dir}/collision_rate.csv, picture beside it", soft_wrap=True, markup=False)
    return result


def load_spread(plan: Plan) -> int:
    """Largest difference in load between two states of one row and group.

    The load over a whole layer also varies because important channels have more states; this is the hash's own part.
    """
    loads = [plan.placement(block.choice, span.size).load for block in plan.blocks for span in plan.spans]
    return max((int((load.amax(1) - load.amin(1)).max()) for load in loads), default=0)


def _measured(config: TrainConfig, settings: CollisionRate) -> dict[str, Any]:
    _, data = text_of(config)
    model = model_of(config)
    importance = importance_of(config, model, data, settings.sequences)
    found = {}
    for name in settings.hashes:
        allocate_(model, dataclasses.replace(sketch_config(config), hash=name), importance)
        found[name] = _collisions(model)
    return {"finished": True, "hashes": found}


def _collisions(model: nn.Module) -> dict[str, Any]:
    report = compression_report(model)
    histogram: dict[int, int] = {}
    spreads = {}
    for name, layer in compressed_layers(model).items():
        assert isinstance(layer.plan, SketchPlan)
        spreads[name] = load_spread(layer.plan)
        for load, states in enumerate(layer.plan.load_counts.tolist()):
            if states:
                histogram[load] = histogram.get(load, 0) + states
    return {
        "bits_per_weight": report.bits_per_weight,
        "unoccupied": histogram.get(0, 0) / max(sum(histogram.values()), 1),
        "load_histogram": {str(load): histogram[load] for load in sorted(histogram)},
        "layers": [_layer_row(layer, spreads[layer.name]) for layer in report.layers],
    }


def _layer_row(layer: LayerReport, spread: int) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "out": layer.shape[0],
        "in": layer.shape[1],
        "bits_per_weight": layer.bits_per_weight,
        "states": layer.value("states"),
        "unoccupied": 1 - layer.value("occupancy"),
        "load_min": layer.value("load_min"),
        "load_mean": layer.value("load_mean"),
        "load_max": layer.value("load_max"),
        "load_spread": spread,
        "relative_error": layer.relative_error,
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title="Collisions by kind of layer, untrained",
        caption="no member: share of states, and of the worst layer's (! above the limit of "
        f"{UNOCCUPIED_LIMIT:.0%}); load: members per state; spread: largest difference in a group",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layers")
    table.add_column("hash", no_wrap=True)
    for heading in ("states", "no member", "worst", "load min", "mean", "max", "spread"):
        table.add_column(heading, justify="right")
    kinds: dict[str, None] = {}
    for found in result["hashes"].values():
        kinds |= dict.fromkeys(layer["layer"].rpartition(".")[2] for layer in found["layers"])
    for kind in [*kinds, "all"]:
        for name, found in result["hashes"].items():
            last = name == list(result["hashes"])[-1]
            layers = [layer for layer in found["layers"] if kind in ("all", layer["layer"].rpartition(".")[2])]
            table.add_row(kind.removesuffix("_proj"), name, *_summary(layers), end_section=last)
    return table


def _summary(layers: list[dict[str, Any]]) -> list[str]:
    states = sum(layer["states"] for layer in layers)

    def mean(key: str) -> float:
        return float(sum(layer[key] * layer["states"] for layer in layers)) / max(states, 1)

    worst = max(layer["unoccupied"] for layer in layers)
    return [
        f"{states:,}",
        f"{mean('unoccupied'):.2%}",
        f"{worst:.2%}{' !' if worst > UNOCCUPIED_LIMIT else ''}",
        str(min(layer["load_min"] for layer in layers)),
        f"{mean('load_mean'):.1f}",
        str(max(layer["load_max"] for layer in layers)),
        str(max(layer["load_spread"] for layer in layers)),
    ]


def _draw(result: dict[str, Any], path: Path) -> None:
    figure, (left, middle, right) = new_picture(
        ["States without a member", "Largest load difference in a group", "Members per state, all layers"]
    )
    for name, found in result["hashes"].items():
        numbers = range(len(found["layers"]))
        left.plot(numbers, [100 * layer["unoccupied"] for layer in found["layers"]], label=name)
        middle.plot(numbers, [layer["load_spread"] for layer in found["layers"]], label=name)
        loads = {int(load): states for load, states in found["load_histogram"].items()}
        total = sum(loads.values())
        upto = [100 * states / total for states in accumulate(loads.values())]
        right.step([0, *loads], [0, *upto], where="post", label=name)
    left.axhline(100 * UNOCCUPIED_LIMIT, color="gray", ls="--", label=f"limit {UNOCCUPIED_LIMIT:.0%}")
    left.set(xlabel="layer, in model order", ylabel="% of states")
    middle.set(xlabel="layer, in model order", ylabel="members")
    right.set(xlabel="members", ylabel="% of states with at most as many")
    right.set_xscale("symlog", linthresh=1)
    right.set_xlim(left=0)
    for panel in (left, middle, right):
        panel.legend()
    save_picture(figure, path)
