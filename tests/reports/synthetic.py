"""A sweep as ``usllm-train -m`` leaves it, without training anything: for tests, and for looking at the page.

Called as a script it writes one: ``python tests/reports/synthetic.py folder``.
"""

from __future__ import annotations

import csv
import itertools
import math
import random
import sys
from pathlib import Path
from typing import Any

import yaml

from usllm.system.files import write_json

RATES, ROWS, ALLOCATIONS = (0.5, 1.0), (1, 3), ("proportional", "waterfill")
BLOCKS = 30
PROJECTIONS = {"self_attn.q_proj": 4, "self_attn.k_proj": 1, "self_attn.v_proj": 1}
PROJECTIONS |= {"mlp.gate_proj": 8, "mlp.up_proj": 8, "mlp.down_proj": 8}
DENSE = {"wikitext2": 30.2, "imdb": 42.8}
STEPS = 120
NASTY = "<script>alert(1)</script> & $x_1$ \"'|`"
"""A model's name that must reach the reader as it is and mean nothing."""


def config(rate: float, rows: int, allocation: str, model: str = "SmolLM2-135M", seed: int = 0) -> dict[str, Any]:
    """A resolved configuration, as far as reports look at it."""
    return {
        "name": "sweep",
        "study": None,
        "seed": seed,
        "model": {"kind": "hub", "name": model, "file": None, "revision": None},
        "data": {"batch_size": 2, "context_length": 64},
        "sketch": {"operator": "absmaxmin", "bits_per_weight": rate, "rows": rows},
        "allocation": {"name": allocation},
        "objective": {"name": "cross_entropy"},
        "callbacks": {"importance_calibration": {"sequences": 64}},
        "trainer": {"max_steps": STEPS, "accumulate_grad_batches": 1},
        "optimizer": {"lr": 1e-4},
    }


def layers(rate: float, rows: int, allocation: str, blocks: int = BLOCKS) -> list[dict[str, Any]]:
    """Layers with errors that fall with the rate."""
    found = []
    for block, (name, size) in itertools.product(range(blocks), PROJECTIONS.items()):
        weights = size * 64 * 64
        better = {"waterfill": 0.55, "uniform": 1.3}.get(allocation, 1.0)
        wave = 0.12 * math.sin(block / 3 + size)
        states = int(weights * rate / 4 * (1.6 if allocation == "waterfill" else 1.0) * (1 + wave))
        found.append(
            {
                "name": f"model.layers.{block}.{name}",
                "shape": [size * 64, 64],
                "bits": int(weights * rate),
                "bits_per_weight": rate * (1 - 1e-4 * block),
                "states": states,
                "occupancy": 1.0,
                "load": [1, weights / states, 9],
                "importance": 1.0,
                "relative_error": better * (0.75 - 0.3 * rate + 0.03 * rows) * (1 + wave) * (0.6 + size / 16),
                "sections": {},
                "classes": [[rows, 32, 4, 40], [rows, 8, 4, 20], [0, 0, 0, 4]],
            }
        )
    return found


def losses(rate: float, rows: int, allocation: str, steps: int, dense: bool = False) -> list[float]:
    """A falling, noisy training loss."""
    draw = random.Random(f"{rate} {rows} {allocation}")
    if dense:
        return [3.4 + draw.gauss(0, 0.05) for _ in range(steps)]
    end = 7.2 - 1.4 * rate + 0.2 * rows - (0.9 if allocation == "waterfill" else 0.0)
    return [end + 5 * math.exp(-8 * step / STEPS) + draw.gauss(0, 0.08) for step in range(steps)]


def write_curves(folder: Path, values: list[float], first: int = 0, version: int = 0) -> None:
    """One of the CSV logger's files, with the configuration beside it."""
    path = folder / "csv" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "lr/pg1", "step", "train/loss", "val/loss", "val/ppl"])
        for step, value in enumerate(values, first):
            writer.writerow(["", 1e-4, step, "", "", ""])
            writer.writerow([0, "", step, value, "", ""])
            if (step + 1) % 30 == 0:
                writer.writerow([0, "", step, "", value + 0.2, math.exp(value + 0.2)])


def report(settings: dict[str, Any], loss: float, dense: bool = False, blocks: int = BLOCKS) -> dict[str, Any]:
    """The content of ``report.json``."""
    rate, rows, allocation = (
        settings["sketch"]["bits_per_weight"],
        settings["sketch"]["rows"],
        settings["allocation"]["name"],
    )
    rest, weights = 38_300_000, 96_215_040
    perplexity = [
        {
            "test_set": name,
            "window": 512,
            "windows": 8,
            "tokens": 301_948,
            "dense": value,
            "sketched": value if dense else value * 10 ** (5 - rate),
            "finetuned": value * (0.9 if dense else math.exp(loss - 3.2)),
        }
        for name, value in DENSE.items()
    ]
    warning = {"check": "perplexity", "step": 101, "message": "perplexity 3786 (training loss), limit 1000."}
    return {
        "finished": True,
        "name": settings["name"],
        "command": f"usllm-train sketch.bits_per_weight={rate}",
        "perplexity": perplexity,
        "bits_per_weight": None
        if dense
        else {
            "asked": rate,
            "achieved": rate * 0.9993,
            "with_entries": rate * 1.002,
            "model": (rate * weights + 16 * rest) / (weights + rest),
        },
        "bytes": None
        if dense
        else {"sketched": int(rate * weights / 8) + 2 * rest, "dense_bf16": 2 * (weights + rest)},
        "compression": None if dense else {"layers": layers(rate, rows, allocation, blocks)},
        "steps": STEPS,
        "tokens": STEPS * 128,
        "seconds": {"training": 431.5 + 60 * rows, "total": 500.0},
        "health": {} if dense or loss < 6 else {"warnings": [warning], "healthy": False},
        "machine": {
            "cpu": "AMD EPYC",
            "cores": 2,
            "gpus": [],
            "system": "Linux",
            "python": "3.11.7",
            "versions": {"usllm": "0.1.0", "torch": "2.13.0+cpu"},
        },
        "config": settings,
    }


def write_run(
    folder: Path, settings: dict[str, Any], *, steps: int = STEPS, dense: bool = False, blocks: int = BLOCKS
) -> Path:
    """A run in a folder of its own; one with fewer ``steps`` than it was asked for was interrupted."""
    rate, rows = settings["sketch"]["bits_per_weight"], settings["sketch"]["rows"]
    allocation = settings["allocation"]["name"]
    values = losses(rate, rows, allocation, steps, dense)
    hydra = folder / ".hydra"
    hydra.mkdir(parents=True)
    overrides = [
        "experiment=sweep",
        f"sketch.bits_per_weight={rate}",
        f"sketch.rows={rows}",
        f"allocation={allocation}",
    ]
    (hydra / "overrides.yaml").write_text(yaml.safe_dump(overrides), encoding="utf-8")
    (hydra / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    write_curves(folder, values)
    full = report(settings, values[-1], dense, blocks)
    baseline = [
        {k: v for k, v in row.items() if k not in ("dense", "sketched", "finetuned")} for row in full["perplexity"]
    ]
    stages = {
        stage: [{**b, "perplexity": r[stage]} for b, r in zip(baseline, full["perplexity"], strict=True)]
        for stage in ("dense", "sketched")
    }
    write_json(folder / "baseline.json", stages)
    if steps == STEPS:
        write_json(folder / "report.json", full)
    return folder


def write_sweep(root: Path) -> Path:
    """Two rates, two row counts, two allocations; one run of them was interrupted, one failed, and one is dense."""
    runs = list(itertools.product(RATES, ROWS, ALLOCATIONS))
    for number, (rate, rows, allocation) in enumerate(runs):
        folder = root / f"allocation-{allocation}+sketch.bits_per_weight-{rate:g}+sketch.rows-{rows}"
        steps = {len(runs) - 1: STEPS // 2, len(runs) - 2: STEPS // 3}.get(number, STEPS)
        write_run(folder, config(rate, rows, allocation), steps=steps)
        if number == len(runs) - 2:
            write_json(folder / "failure.json", {"error": "OutOfMemoryError", "message": "tried to allocate 2 GiB"})
    write_run(root / "dense", config(0.5, 1, "proportional"), dense=True)
    return root


if __name__ == "__main__":
    print(write_sweep(Path(sys.argv[1])))
