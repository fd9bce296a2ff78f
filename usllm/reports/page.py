"""The report as one HTML file that needs nothing else: drawings, style and script are inside it."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from usllm.reports.labels import labels, text_names, texts_of
from usllm.reports.runs import FINISHED, Run
from usllm.reports.table import Column, columns
from usllm.system.text import perplexity_text

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Drawing:
    """One figure of the page.

    Attributes:
        svg: In the page's colours (:func:`usllm.reports.style.themed`).
        caption: What it shows and how to read it.
        wide: Whether it takes the page's whole width.
    """

    svg: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """All runs that began with one dense model.

    Attributes:
        model: Its name.
        runs: The runs.
        drawings: Figures by the heading above them; those under the first heading come before the table.
    """

    model: str
    runs: Sequence[Run]
    drawings: Mapping[str, Sequence[Drawing]]


def render(sections: Sequence[Section], *, title: str, command: str, made: str, version: str) -> str:
    """The page.

    Args:
        sections: One for each dense model.
        title: Its heading.
        command: What was typed to make it.
        made: When.
        version: Of usllm.
    """
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return str(
        _template().render(
            sections=[_section(section, number) for number, section in enumerate(sections)],
            title=title,
            command=command,
            made=made,
            version=version,
            style=(_HERE / "report.css").read_text(encoding="utf-8"),
            script=script,
            # The browser itself keeps the page from loading anything, and from running any other script.
            policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
        )
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(_HERE)
    # Names of runs and models come from outside: everything that is not marked as safe is escaped.
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html.j2")


def _section(section: Section, number: int) -> dict[str, Any]:
    runs, names = section.runs, labels(section.runs)
    texts = texts_of(runs)
    shown = _useful(columns(names, text_names(texts, short=True)), runs)
    warned = [(names[run.name], run.name, run.warnings) for run in runs if run.warnings]
    return {
        "id": f"model-{number}",
        "model": section.model,
        "summary": summary(runs),
        "first": dict(list(section.drawings.items())[:1]),
        "others": dict(list(section.drawings.items())[1:]),
        "columns": shown,
        "rows": [(run, [_cell(column, run) for column in shown]) for run in runs],
        "warnings": warned,
        "machines": machines(runs),
    }


def summary(runs: Sequence[Run]) -> list[str]:
    """What a reader wants to know first, in a line each: how many runs, and the best of them on each text."""
    counts = {status: sum(run.status == status for run in runs) for status in dict.fromkeys(r.status for r in runs)}
    states = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [f"{len(runs)} run{'s' if len(runs) != 1 else ''}: {states}."]
    names = labels(runs)
    for text, name in text_names(texts_of(runs)).items():
        measured = [run for run in runs if run.finetuned(text) is not None and not run.dense and run.status == FINISHED]
        if not measured:
            continue
        best = min(measured, key=lambda run: run.finetuned(text) or math.inf)
        dense = best.perplexity[text].dense
        against = "" if dense is None else f", dense model {perplexity_text(dense)}"
        lowest = perplexity_text(best.finetuned(text) or math.inf)
        lines.append(f"Lowest perplexity on {name}: {lowest} ({names[best.name]}){against}.")
    return lines


def machines(runs: Sequence[Run]) -> list[str]:
    """Each machine and set of versions that runs were made with."""
    lines = []
    for run in runs:
        info = run.machine
        if not info:
            continue
        gpus = info.get("gpus")
        parts = [f"{info.get('cpu')}, {info.get('cores')} cores"]
        parts += [str(gpu) for gpu in gpus] if isinstance(gpus, list) else []
        parts += [f"{info.get('system', '')} Python {info.get('python')}".strip()]
        versions = info.get("versions")
        parts += [f"{name} {value}" for name, value in versions.items()] if isinstance(versions, Mapping) else []
        lines.append(", ".join(parts))
    return list(dict.fromkeys(lines))


def _useful(found: Sequence[Column], runs: Sequence[Run]) -> list[Column]:
    """Columns in which some run has a value."""
    return [column for column in found if any(column.value(run) not in (None, "") for run in runs)]


def _cell(column: Column, run: Run) -> dict[str, Any]:
    value = column.value(run)
    # Nothing, and what is not a number, goes last in either direction.
    missing = value is None or value == "" or (isinstance(value, float) and math.isnan(value))
    return {
        "text": column.shown(run),
        "key": "" if missing else value,
        "numeric": column.numeric,
        "title": column.title,
    }
