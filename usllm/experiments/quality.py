"""Sketches against each other and against the dense model finetuned alike: one table over all variants."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from usllm.experiments.inputs import study_settings
from usllm.experiments.variants import run_variants
from usllm.runs.report import human_bytes
from usllm.system.errors import UserError
from usllm.system.files import write_json
from usllm.system.stage_names import DENSE, FINETUNED, HEADINGS, SKETCHED, with_todays_names
from usllm.system.text import perplexity_text


@dataclass(frozen=True)
class Quality:
    """Settings of the study.

    Attributes:
        name: ``quality``.
        variants: overrides by variant name, ``dense: true`` for the dense model finetuned alike.
    """

    name: str
    variants: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.variants:
            raise UserError("study.variants={}: give at least one variant, such as dense: {dense: true}")


def run(cfg: DictConfig, study: dict[str, Any], command: str) -> dict[str, Any]:
    """Finetune all variants of ``study["variants"]`` and print the table; writes ``quality.json``.

    Raises:
        UserError: A variant's configuration has a problem.
    """
    reports = run_variants(cfg, study_settings(Quality, study).variants, command)
    rows = [_row(name, report) for name, report in reports.items()]
    result = {"command": command, "rows": rows, "machine": next(iter(reports.values()))["machine"]}
    write_json(Path(cfg.run_dir) / "quality.json", result)
    Console().print(_table(rows))
    return result


def _row(name: str, report: dict[str, Any]) -> dict[str, Any]:
    bits = report["bits_per_weight"] or {}
    perplexity = {
        f"{row['test_set']}/{row['window']}": {key: with_todays_names(row).get(key) for key in HEADINGS}
        for row in report["perplexity"]
    }
    return {
        "variant": name,
        "bits_per_weight": bits.get("achieved"),
        "model_bits_per_weight": bits.get("model"),
        "bytes": (report["bytes"] or {}).get("sketched"),
        "steps": report["steps"],
        "tokens": report["tokens"],
        "seconds": report["seconds"]["training"],
        "perplexity": perplexity,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Perplexity by variant", title_justify="left")
    table.add_column("variant")
    for heading in ("bpw", "model bpw", "bytes"):
        table.add_column(heading, justify="right")
    sets = list(rows[0]["perplexity"])
    for name in sets:
        table.add_column(f"{name} sketched", justify="right")
        table.add_column("finetuned", justify="right")
    for row in rows:
        figures = []
        for name in sets:
            stages = row["perplexity"][name]
            figures += [perplexity_text(stages[SKETCHED] or stages[DENSE]), perplexity_text(stages[FINETUNED])]
        size = "-" if row["bytes"] is None else human_bytes(row["bytes"])
        rates = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("bits_per_weight", "model_bits_per_weight")]
        table.add_row(row["variant"], *rates, size, *figures)
    return table
