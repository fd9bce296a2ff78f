"""Groups of runs that compare, and short labels that tell the runs of a group apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from usllm.reports.runs import Perplexities, Run, TestText

# Parts of a configuration that say where things are, how they are shown, or what is asked for in other words.
_SILENT = ("name", "run_dir", "output_root", "resume", "study", "logger", "evaluation", "hydra")
_SHOWN = ("sketch.bits_per_weight", "sketch.rows", "allocation.name")  # part of every label
_MORE = 2  # settings added to a label before the run's name serves better


def with_short_names(runs: Sequence[Run]) -> list[Run]:
    """The runs named by their folders below the deepest folder that all share; a single run keeps its last one."""
    parts = [run.name.split("/") for run in runs]
    shared = 0
    while all(len(names) > shared + 1 for names in parts) and len({names[shared] for names in parts}) == 1:
        shared += 1
    return [replace(run, name="/".join(names[shared:])) for run, names in zip(runs, parts, strict=True)]


def by_model(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by dense model, in the order in which the models come up; within one by rate, rows and allocation."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.model, []).append(run)
    return {model: sorted(group, key=_order) for model, group in groups.items()}


def texts_of(runs: Sequence[Run]) -> list[TestText]:
    """The test texts of the runs, in the order in which they come up."""
    return list(dict.fromkeys(text for run in runs for text in run.perplexity))


def text_names(texts: Sequence[TestText], short: bool = False) -> dict[TestText, str]:
    """A name for each test text, with as much of what was measured as tells them apart.

    Args:
        texts: The test texts.
        short: Leave the window out where it tells nothing apart.
    """
    names: dict[TestText, str] = {}
    for text in texts:
        same = [other for other in texts if other.name == text.name]
        alike = [other for other in same if (other.window, other.window_start) == (text.window, text.window_start)]
        names[text] = str(text)
        if short and len({other.window for other in same}) == 1:
            names[text] = str(text).replace(f", window {text.window}", "")
        if len(alike) > 1:
            names[text] += f", {text.windows} windows"
        if len({other.windows for other in alike}) < len(alike):
            names[text] += f" of {text.tokens:,} tokens"
    return names


def dense_perplexity(runs: Sequence[Run], text: TestText) -> float | None:
    """The perplexity of the dense model that the runs began with."""
    return next((v for run in runs if (v := run.perplexity.get(text, Perplexities()).dense) is not None), None)


def labels(runs: Sequence[Run]) -> dict[str, str]:
    """A label for each run of a group, by the run's name: rate, rows, allocation, and what else it takes to differ."""
    found = {run.name: _label(run) for run in runs}
    settings = {run.name: _flat(run.config) for run in runs}
    for label, count in Counter(found.values()).items():
        if count == 1:
            continue
        alike = [run for run in runs if found[run.name] == label]
        keys = sorted({key for run in alike for key in settings[run.name]} - set(_SHOWN))
        differing = [key for key in keys if len({settings[run.name].get(key) for run in alike}) > 1]
        own = {
            run.name: ", ".join(f"{key.rpartition('.')[2]}={settings[run.name].get(key)}" for key in differing)
            for run in alike
        }
        telling = 0 < len(differing) <= _MORE and len(set(own.values())) == count
        for run in alike:
            found[run.name] = f"{label}, {own[run.name] if telling else run.name}"
    return found


def _label(run: Run) -> str:
    if run.dense:
        return "dense"
    rows = None if run.rows is None else f"{run.rows} row{'s' if run.rows != 1 else ''}"
    rate = None if run.bits_asked is None else f"{run.bits_asked:g} bpw"
    return ", ".join(part for part in (rate, rows, run.allocation) if part) or run.name


def _order(run: Run) -> tuple[Any, ...]:
    return not run.dense, run.bits_asked or 0.0, str(run.allocation), run.rows or 0, run.name


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if not prefix and key in _SILENT:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif not (isinstance(value, str) and ("/" in value or "${" in value)):  # a path says where
            flat[name] = str(value)
    return flat
