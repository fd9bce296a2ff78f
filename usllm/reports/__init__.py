"""Reads runs and shows them: records, figures, one HTML page, a Markdown table.

From Python, as in ``notebooks/03_sweep.ipynb``::

    from usllm.reports import perplexity_by_rate, read_runs, texts_of

    runs = read_runs(["runs/sweep"])
    perplexity_by_rate(runs, texts_of(runs)[0]).savefig("front.png")
"""

from __future__ import annotations

from usllm.reports.block_figures import block_errors
from usllm.reports.curve_figures import training_curves
from usllm.reports.figures import Reference, pareto_front, perplexity_by_bytes, perplexity_by_rate
from usllm.reports.heat_maps import ERROR, RATE, fact, heat_maps
from usllm.reports.labels import by_model, labels, texts_of
from usllm.reports.runs import Layer, Perplexities, Run, TestText
from usllm.reports.settings import read_runs
from usllm.reports.table import markdown

__all__ = [
    "ERROR",
    "RATE",
    "Layer",
    "Perplexities",
    "Reference",
    "Run",
    "TestText",
    "block_errors",
    "by_model",
    "fact",
    "heat_maps",
    "labels",
    "markdown",
    "pareto_front",
    "perplexity_by_bytes",
    "perplexity_by_rate",
    "read_runs",
    "texts_of",
    "training_curves",
]
