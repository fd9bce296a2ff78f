"""What ``usllm-report`` is told, checked; and from it to files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from usllm.reports.figures import Reference
from usllm.reports.labels import by_model, texts_of, with_short_names
from usllm.reports.runs import Run, TestText
from usllm.system.errors import UserError
from usllm.system.files import expanded, read_json, unusable

WANDB = "wandb:"


@dataclass
class ReferenceSettings:
    """Another compressed model. Attributes as in ``conf/report.yaml``."""

    name: str = "4-bit"
    perplexity: Any = None
    evaluation: str | None = None
    bytes: int | None = None


@dataclass
class ReportSettings:
    """Everything ``usllm-report`` reads. Attributes as in ``conf/report.yaml``."""

    runs: Any = MISSING
    out: str = "report"
    title: str | None = None
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    plugins: list[str] = field(default_factory=list)


def check_report(cfg: DictConfig) -> ReportSettings:
    """Typed settings.

    Raises:
        UserError: A key is unknown, a value has the wrong type, or ``runs`` is not given.
    """
    if not isinstance(cfg.get("reference", DictConfig({})), DictConfig):
        raise UserError(f"reference={cfg.get('reference')}: must be a group of settings, as reference.perplexity=33.1")
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ReportSettings), cfg))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        if OmegaConf.is_missing(cfg, "runs"):
            raise UserError("runs: needs a value; pass runs=<folder of a run or of a sweep>") from error
        raise UserError(f"{key}{str(error).splitlines()[0]}") from error
    assert isinstance(settings, ReportSettings)
    places = settings.runs if isinstance(settings.runs, list) else [settings.runs]
    if not places or not all(isinstance(place, str) and place for place in places):
        raise UserError(f"runs={settings.runs}: must be a folder, a list of folders, or wandb:<entity>/<project>")
    settings.runs = places
    if not settings.out:
        raise UserError("out=: is empty; give the folder that the page goes to")
    if (reason := unusable(expanded(settings.out) / "report.html")) is not None:
        raise UserError(f"out={settings.out}: {reason}; give another folder")
    given = settings.reference
    if given.perplexity is not None and given.evaluation is not None:
        raise UserError("reference.perplexity and reference.evaluation: give one of them")
    if given.bytes is not None and given.bytes < 1:
        raise UserError(f"reference.bytes={given.bytes}: must be a number of bytes of at least 1")
    return settings


def read_runs(places: Sequence[str]) -> list[Run]:
    """The runs of all ``places``, folders or W&B projects; none twice.

    Raises:
        UserError: A place does not exist, cannot be reached, or holds no run.
    """
    from usllm.reports.directory import read_folder

    found: dict[str, Run] = {}
    for place in places:
        if place.startswith(WANDB):
            from usllm.reports.wandb_project import read_project

            runs = read_project(place.removeprefix(WANDB))
        else:
            runs = [replace(run, name=run.place.strip("/")) for run in read_folder(place)]
        for run in runs:
            found.setdefault(run.place, run)
    return with_short_names(list(found.values()))


def references(given: ReferenceSettings, runs: Sequence[Run]) -> dict[str, Reference]:
    """The reference by dense model, with a perplexity for each test text that it was measured on.

    Raises:
        UserError: The figures do not tell which test set they belong to, or belong to none of the runs'.
    """
    if given.perplexity is None and given.evaluation is None:
        return {}
    texts = texts_of(runs)
    found = _evaluated(given.evaluation, texts) if given.evaluation else _stated(given.perplexity, texts)
    return {
        model: Reference(
            given.name, {text: value for text, value in found.items() if text in texts_of(group)}, given.bytes
        )
        for model, group in by_model(runs).items()
    }


def _stated(perplexity: Any, texts: Sequence[TestText]) -> dict[TestText, float]:
    names = sorted({text.name for text in texts})
    if isinstance(perplexity, Mapping):
        values = {str(name): _positive(f"reference.perplexity.{name}", value) for name, value in perplexity.items()}
        for name in values:
            if name not in names:
                raise UserError(f"reference.perplexity.{name}: no run was measured on it; known: {', '.join(names)}")
    else:
        value = _positive("reference.perplexity", perplexity)
        if len(names) != 1:
            raise UserError(
                f"reference.perplexity={perplexity}: the runs have {len(names)} test sets ({', '.join(names)}); say "
                f"which one it is, as in 'reference.perplexity={{{names[0] if names else 'wikitext2'}: {perplexity}}}'"
            )
        values = {names[0]: value}
    found = {text: values[text.name] for text in texts if text.name in values}
    for name in values:
        if len(same := {text.window for text in found if text.name == name}) > 1:
            windows = ", ".join(str(window) for window in sorted(same))
            raise UserError(
                f"reference.perplexity: {name} was measured with windows of {windows} tokens, and perplexities of "
                "different windows do not compare; give reference.evaluation=<evaluation.json of usllm-eval> instead"
            )
    return found


def _evaluated(path: str, texts: Sequence[TestText]) -> dict[TestText, float]:
    try:
        content = read_json(expanded(path), ours=False)
    except UserError as error:
        raise UserError(f"reference.evaluation={path}: {error} (an evaluation.json of usllm-eval)") from error
    if content is None:
        raise UserError(f"reference.evaluation={path}: no such file; give an evaluation.json of usllm-eval")
    rows = content.get("perplexity")
    try:
        found = {
            text: float(row["perplexity"])
            for row in rows or []
            for text in texts
            if (row["test_set"], row["window"], row["windows"]) == (text.name, text.window, text.windows)
            and row.get("window_start", "none") == text.window_start
        }
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"reference.evaluation={path}: is not an evaluation.json of usllm-eval") from error
    if not found:
        known = ", ".join(f"{text} ({text.windows} windows)" for text in texts)
        raise UserError(
            f"reference.evaluation={path}: was not measured as the runs were, on {known}; measure it with the same "
            "evaluation.test_sets, evaluation.windows, evaluation.max_windows and evaluation.window_start"
        )
    return found


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise UserError(f"{key}={value}: must be a positive number")
    return float(value)
