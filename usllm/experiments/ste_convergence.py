"""Does training through the straight-through estimator converge: loss and perplexity beside the floating-point run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from usllm.config import check_train, plain_config
from usllm.experiments.inputs import study_settings
from usllm.experiments.results import new_picture, save_picture, write_result
from usllm.experiments.variants import metric_curve, run_variants
from usllm.runs.inputs import VALIDATION_SET
from usllm.system.errors import UserError
from usllm.system.machine import machine
from usllm.system.text import perplexity_text

FILE = "ste_convergence.json"


@dataclass(frozen=True)
class SteConvergence:
    """Settings of the study.

    Attributes:
        name: ``ste_convergence``.
        variants: overrides by variant name, ``dense: true`` for the floating-point run.
    """

    name: str
    variants: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.variants:
            raise UserError("study.variants={}: give at least one variant, such as dense: {dense: true}")


def run(cfg: DictConfig, study: dict[str, Any], command: str) -> dict[str, Any]:
    """Finetune all variants and set their curves side by side; writes ``ste_convergence.json`` and ``.png``.

    Raises:
        UserError: A variant's configuration has a problem, or the metrics are not logged as CSV.
    """
    config, plain, settings = check_train(cfg), plain_config(cfg), study_settings(SteConvergence, study)
    if (config.logger or {}).get("csv") is None:
        raise UserError("logger.csv=null: the study reads its curves from the CSV log; keep logger=csv")
    reports = run_variants(cfg, settings.variants, command)
    variants = {name: _curves(Path(config.run_dir) / name, report) for name, report in reports.items()}
    result = {"finished": True, "command": command, "variants": variants, "machine": machine()}
    write_result(config, plain, FILE, result)
    _draw(variants, Path(config.run_dir) / "ste_convergence.png")
    console = Console()
    console.print(_table(variants))
    for name, variant in variants.items():
        if variant["instability"] is not None:
            console.print(f"{name}: loss changes {variant['instability']:.2f} times those of the reference per step")
    console.print(f"result: {config.run_dir}/{FILE}, picture beside it", soft_wrap=True, markup=False)
    return result


def _curves(run_dir: Path, report: dict[str, Any]) -> dict[str, Any]:
    """What one run logged: a point per validation, and the loss of every logged step."""
    epochs, last = report["config"]["trainer"].get("epochs"), report["steps"]
    # Lightning numbers a row by the finished steps before it, so the first step is 0.
    losses = _counted(*metric_curve(run_dir, "train/loss"))
    validations = _counted(*metric_curve(run_dir, "val/ppl"))
    points = [{"step": 0, "epoch": 0.0, "train_loss": None, "val_ppl": start_perplexity(report)}]
    before = 0
    for step, perplexity in validations.items():
        since = [loss for at, loss in losses.items() if before < at <= step]
        before = step
        points.append(
            {
                "step": step,
                "epoch": None if epochs is None else step * epochs / last,
                "train_loss": sum(since) / len(since) if since else None,
                "val_ppl": perplexity,
            }
        )
    bits = report["bits_per_weight"] or {}
    return {
        "bits_per_weight": bits.get("achieved"),
        "tokens": report["tokens"],
        "seconds": report["seconds"]["training"],
        "perplexity": report["perplexity"],
        "instability": ((report["health"] or {}).get("loss_stability") or {}).get("value"),
        "points": points,
        "losses": {"step": list(losses), "loss": list(losses.values())},
    }


def start_perplexity(report: dict[str, Any]) -> float | None:
    """Perplexity before the first step, on the very sequences that validation measures; ``None`` if on others."""
    data, limit = report["config"]["data"], report["config"]["trainer"].get("limit_val_batches", 1.0)
    for row in report["perplexity"]:
        if row["test_set"] != VALIDATION_SET or row["window"] != data["context_length"]:
            continue
        sequences = row["tokens"] // row["window"]
        if isinstance(limit, int):
            validated = min(limit * data["batch_size"], sequences)
        else:
            batches = -(-sequences // data["batch_size"])
            validated = min(int(limit * batches) * data["batch_size"], sequences)
        if row["windows"] == validated:
            found: float | None = row.get("sketched")
            return found
    return None


def _counted(steps: list[int], values: list[float]) -> dict[int, float]:
    return {step + 1: value for step, value in zip(steps, values, strict=True)}


def _table(variants: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Convergence through the sketch", title_justify="left")
    table.add_column("epoch", justify="right")
    table.add_column("step", justify="right")
    for name, variant in variants.items():
        rate = variant["bits_per_weight"]
        label = name if rate is None else f"{name} ({rate:.2f} bpw)"
        table.add_column(f"{label} loss", justify="right")
        table.add_column("val ppl", justify="right")
    points = {name: {point["step"]: point for point in variant["points"]} for name, variant in variants.items()}
    for step in sorted(set().union(*points.values())):
        at = [found.get(step, {}) for found in points.values()]
        epoch = next((point["epoch"] for point in at if point.get("epoch") is not None), None)
        figures = [perplexity_text(point.get(key)) for point in at for key in ("train_loss", "val_ppl")]
        table.add_row("-" if epoch is None else f"{epoch:.3g}", str(step), *figures)
    return table


def _draw(variants: dict[str, dict[str, Any]], path: Path) -> None:
    figure, (left, right) = new_picture(["Training loss", "Validation perplexity"])
    for name, variant in variants.items():
        (line,) = left.plot(variant["losses"]["step"], variant["losses"]["loss"], lw=0.7, alpha=0.5)
        means = [point for point in variant["points"] if point["train_loss"] is not None]
        left.plot(
            [p["step"] for p in means], [p["train_loss"] for p in means], "o-", color=line.get_color(), label=name
        )
        known = [point for point in variant["points"] if point["val_ppl"] is not None]
        right.plot([p["step"] for p in known], [p["val_ppl"] for p in known], "o-", color=line.get_color(), label=name)
    left.set(xlabel="optimizer step", ylabel="loss, nats per token")
    right.set(xlabel="optimizer step", ylabel="perplexity", yscale="log")
    for panel in (left, right):
        panel.legend()
    save_picture(figure, path)
