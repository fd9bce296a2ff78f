"""The runs as a table: its columns, shared by the page and the Markdown file, and that file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from usllm.reports.figures import Reference
from usllm.reports.labels import by_model, dense_perplexity, labels, text_names, texts_of
from usllm.reports.runs import Perplexities, Run, TestText
from usllm.system.stage_names import FINETUNED, HEADINGS, RECONSTRUCTED, SKETCHED
from usllm.system.text import human_seconds, perplexity_text

NONE = "-"
_HINTS = {
    SKETCHED: "perplexity, sketched, not trained",
    RECONSTRUCTED: "perplexity after the stages behind the first projection, such as reconstruction",
    FINETUNED: "perplexity after finetuning",
}
"""What a perplexity's heading means, by stage."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: Heading.
        value: What it is sorted by; ``None`` where a run has none.
        text: What it shows.
        numeric: Whether values are numbers, aligned at their right ends.
        hint: What the heading means.
    """

    title: str
    value: Callable[[Run], Any]
    text: Callable[[Any], str] = str
    numeric: bool = False
    hint: str = ""

    def shown(self, run: Run) -> str:
        """The text of one cell."""
        value = self.value(run)
        return NONE if value is None or value == "" else self.text(value)


def _stages(runs: Sequence[Run]) -> list[str]:
    """The stages whose perplexities have a column: ``reconstructed`` only where a run has it."""
    rebuilt = any(stages.reconstructed is not None for run in runs for stages in run.perplexity.values())
    return [stage for stage in _HINTS if stage != RECONSTRUCTED or rebuilt]


def columns(names: Mapping[str, str], texts: Mapping[TestText, str]) -> list[Column]:
    """All columns.

    Args:
        names: Labels of the runs, by their names.
        texts: Test texts and their names, as they stand in headings.
    """
    from usllm.runs.report import human_bytes

    def number(title: str, value: Callable[[Run], Any], text: Callable[[Any], str], hint: str = "") -> Column:
        return Column(title, value, text, numeric=True, hint=hint)

    found = [
        Column("run", lambda run: names[run.name]),
        Column("status", lambda run: run.status),
        number(
            "bpw asked", lambda run: run.bits_asked, "{:g}".format, "bits per compressed weight that were asked for"
        ),
        number("bpw", lambda run: run.bits, "{:.4f}".format, "bits per compressed weight, JSON entries of tensors not"),
        number("with entries", lambda run: run.bits_with_entries, "{:.4f}".format, "the same, JSON entries included"),
        number("model bpw", lambda run: run.model_bits, "{:.3f}".format, "bits per parameter of the whole model"),
        number("size", lambda run: run.bytes, human_bytes, "bytes of the packed model"),
        number("rows", lambda run: run.rows, str, "rows of the sketch"),
        Column("allocation", lambda run: "dense" if run.dense else run.allocation),
    ]
    for text, name in texts.items():
        found += [
            number(f"{name} {HEADINGS[stage]}", _stage(text, stage), perplexity_text, hint)
            for stage, hint in _HINTS.items()
        ]
    return [
        *found,
        number("steps", lambda run: run.steps, "{:,}".format),
        number("time", lambda run: run.seconds, human_seconds, "of training"),
        Column("folder", lambda run: run.name),
        Column("overrides", lambda run: " ".join(run.overrides), hint="what was asked for besides the defaults"),
    ]


def markdown(runs: Sequence[Run], reference: Mapping[str, Reference] | None = None) -> str:
    """Tables for a paper: one for each dense model, its finished runs by rate, rows and allocation.

    Args:
        runs: The runs.
        reference: What to compare with, by dense model.
    """
    parts = []
    for model, group in by_model(runs).items():
        finished = [run for run in group if run.status == "finished"]
        texts = text_names(texts_of(finished), short=True)
        if finished:
            parts.append(f"**{_cell(model)}**\n\n{_table(finished, texts, (reference or {}).get(model))}")
        if missing := len(group) - len(finished):
            parts.append(f"{missing} of {len(group)} runs have not finished and are left out.")
    return "\n\n".join(parts) + "\n"


def _table(runs: Sequence[Run], texts: Mapping[TestText, str], reference: Reference | None) -> str:
    from usllm.runs.report import human_bytes

    stages = _stages(runs)
    heads = ["variant", "bpw", "model bpw", "size"]
    heads += [f"{name} {HEADINGS[stage]}" for name in texts.values() for stage in stages]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    dense_bytes = next((run.dense_bytes for run in runs if run.dense_bytes), None)
    dense = ["dense model", NONE, "16", NONE if dense_bytes is None else human_bytes(dense_bytes)]
    rows.append([*dense, *_around(lambda text: dense_perplexity(runs, text), texts, stages)])
    if reference is not None:
        size = NONE if reference.bytes is None else human_bytes(reference.bytes)
        rows.append([reference.name, NONE, NONE, size, *_around(reference.perplexity.get, texts, stages)])
    names = labels(runs)
    shown = {column.title: column for column in columns(names, texts)}
    for run in runs:
        name = "dense, finetuned" if names[run.name] == "dense" else names[run.name]
        cells = [shown[title].shown(run) for title in ("bpw", "model bpw", "size")]
        for text in texts:
            values = [_stage(text, stage)(run) for stage in stages]
            cells += [NONE if value is None else perplexity_text(value) for value in values]
        rows.append([name, *cells])
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)


def _around(
    value: Callable[[TestText], float | None], texts: Mapping[TestText, str], stages: Sequence[str]
) -> list[str]:
    """The cells of a model that is not finetuned: a figure in each ``finetuned``, none in the stages before."""
    found = [value(text) if stage == FINETUNED else None for text in texts for stage in stages]
    return [NONE if figure is None else perplexity_text(figure) for figure in found]


def _stage(text: TestText, stage: str) -> Callable[[Run], float | None]:
    def figure(run: Run) -> float | None:
        measured = run.perplexity.get(text, Perplexities())
        return None if run.dense and stage == SKETCHED else getattr(measured, stage)

    return figure


def _cell(text: str) -> str:
    """``text`` as it is, whatever it holds: Markdown's own signs and HTML mean nothing in it."""
    return text if set(text) <= set("-:") else re.sub(r"([\\`*_{}\[\]<>|#$~])", r"\\\1", " ".join(text.split()))
