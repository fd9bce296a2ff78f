"""From runs to files: ``report.html``, ``table.md``, and each figure as PNG and SVG."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from usllm import __version__
from usllm.reports.block_figures import block_errors
from usllm.reports.curve_figures import NAMED, training_curves
from usllm.reports.figures import Reference, perplexity_by_bytes, perplexity_by_rate
from usllm.reports.heat_maps import Quantity, heat_maps, quantities
from usllm.reports.labels import by_model, text_names, texts_of
from usllm.reports.legend import FRONT
from usllm.reports.page import Drawing, Section, render
from usllm.reports.runs import Run
from usllm.reports.style import png, settle, svg, themed, with_titles
from usllm.reports.table import markdown
from usllm.system.files import expanded, write_together

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, TABLE = "report.html", "table.md"
_HINTS = {
    "rate": "Each point is a run; lower and further left is better.",
    "front": "The grey line joins the runs that no other run beats in both (Pareto front).",
    "bytes": "The same runs by the size of the whole model, embeddings and norms at 16 bits included.",
    "curves": "Training losses are running means over a twentieth of the steps; dashes tell the rows of the sketch.",
}


class ReportWriter:
    """Draws every figure once and collects it, as files and for the page.

    Args:
        out: Folder that everything is written to; made where it is not there.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = expanded(out)
        self.written: list[Path] = []
        self._contents: dict[Path, bytes] = {}

    def write(
        self,
        runs: Sequence[Run],
        *,
        title: str | None,
        command: str,
        references: Mapping[str, Reference] | None = None,
        made: datetime | None = None,
    ) -> Path:
        """Write all files, or none of them; returned is the page.

        Args:
            runs: The runs, of one or several dense models.
            title: Heading of the page; ``None`` takes one from the runs.
            command: What was typed to make it.
            references: What to compare with, by dense model.
            made: When; now by default.

        Raises:
            OSError: One of the files cannot be written.
        """
        references = references or {}
        groups = by_model(runs)
        sections = [
            self._section(model, group, references.get(model), f"{_slug(model)}_" if len(groups) > 1 else "")
            for model, group in groups.items()
        ]
        moment = (made or datetime.now(timezone.utc)).strftime("%Y-%m-%d %H:%M UTC")
        self._save(TABLE, markdown(runs, references).encode())
        heading = title or _heading(runs)
        page = render(sections, title=heading, command=command, made=moment, version=__version__)
        self._save(PAGE, page.encode())
        write_together(self._contents)
        self.written = list(self._contents)
        return self.out / PAGE

    def _section(self, model: str, runs: Sequence[Run], reference: Reference | None, prefix: str) -> Section:
        texts = text_names(texts_of(runs))
        front: list[Drawing] = []
        for text, name in texts.items():
            if not any(run.finetuned(text) is not None and not run.dense for run in runs):
                continue
            for kind, draw in (("rate", perplexity_by_rate), ("bytes", perplexity_by_bytes)):
                figure = draw(runs, text, reference, name)
                file = f"{prefix}perplexity_by_{kind}_{_slug(name)}"
                hint = "" if len(front) > 1 else _HINTS[kind]  # once is enough
                if hint and kind == "rate" and any(line.get_label() == FRONT for line in figure.axes[0].lines):
                    hint = f"{hint} {_HINTS['front']}"
                front.append(self._drawing(figure, file, f"Perplexity on {name} by {kind}", hint))
        curves = training_curves(runs)
        training = []
        if curves is not None:
            drawn = sum(bool(run.curves) for run in runs)
            unnamed = " Rest the pointer on a curve for its run." if drawn > NAMED else ""
            training.append(
                self._drawing(
                    curves, f"{prefix}training_curves", "Losses of all runs", _HINTS["curves"] + unnamed, True
                )
            )
        if (blocks := block_errors(runs)) is not None:
            caption = "Reconstruction: how far each block is from the dense one, on its own stream."
            training.append(
                self._drawing(blocks, f"{prefix}block_errors", "Errors of reconstructed blocks", caption, True)
            )
        layers: list[Drawing] = []
        for quantity in quantities(runs):
            layers += self._strips(runs, quantity, prefix)
        return Section(model, runs, {"Perplexity and size": front, "Training": training, "Layers": layers})

    def _strips(self, runs: Sequence[Run], quantity: Quantity, prefix: str) -> list[Drawing]:
        drawn = heat_maps(runs, quantity)
        found = []
        for number, figure in enumerate(drawn):
            file = f"{prefix}layers_{quantity.key}" + (f"_{number + 1}" if len(drawn) > 1 else "")
            part = f" (part {number + 1} of {len(drawn)})" if len(drawn) > 1 else ""
            found.append(self._drawing(figure, file, f"{quantity.title} by layer", f"{quantity.title}{part}.", True))
        return found

    def _drawing(self, figure: Figure, file: str, description: str, caption: str, wide: bool = False) -> Drawing:
        settle(figure)
        self._save(f"{file}.png", png(figure))
        drawing = svg(figure, file)
        self._save(f"{file}.svg", drawing.encode())
        lines = [line for axes in figure.axes for line in axes.lines if line.get_gid()]
        titles = {f"{file}-{line.get_gid()}": str(line.get_label()) for line in lines}
        return Drawing(themed(with_titles(drawing, titles), description), caption, wide)

    def _save(self, name: str, content: bytes) -> None:
        """Keep a file until all are there: a disk that runs full leaves the old report or none, not parts of two."""
        self._contents[self.out / name] = content


def _heading(runs: Sequence[Run]) -> str:
    """The runs' own name where they have one in common."""
    names = {str(run.config.get("name")) for run in runs if run.config.get("name")}
    return names.pop() if len(names) == 1 else "Sketched models"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_.") or "model"
