"""One finetuning run as a record that figures and tables are made of, and the reader of a directory tree of runs.

What a run has written may be all, some or half of it: a missing part leaves a gap and a note, never an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from usllm.reports.curves import Curve
from usllm.system.stage_names import HEADINGS, with_todays_names

FINISHED, INTERRUPTED, FAILED, RUNNING = "finished", "interrupted", "failed", "running"


@dataclass(frozen=True)
class TestText:
    """What a perplexity was measured on; figures are comparable only where all of it is equal.

    Attributes:
        name: Test set.
        window: Tokens per window.
        windows: Windows measured.
        tokens: Tokens of the whole test set.
        window_start: See :mod:`usllm.data.windows`.
    """

    __test__ = False  # not a test class, whatever pytest makes of its name

    name: str
    window: int
    windows: int
    tokens: int
    window_start: str = "none"

    def __str__(self) -> str:
        start = "" if self.window_start == "none" else f", window start {self.window_start}"
        return f"{self.name}, window {self.window}{start}"


@dataclass(frozen=True)
class Perplexities:
    """Perplexities at the stages of a run; ``None`` where a stage was not measured.

    Attributes:
        dense: The model as it was loaded.
        sketched: Compressed, not trained.
        reconstructed: After the stages that follow ``start``.
        finetuned: Trained end to end.
    """

    dense: float | None = None
    sketched: float | None = None
    reconstructed: float | None = None
    finetuned: float | None = None


@dataclass(frozen=True)
class Layer:
    """One compressed layer.

    Attributes:
        name: Full name.
        block: Number of the decoder block.
        projection: Which linear layer of the block, such as ``gate``.
        weights: Number of weights.
        bits_per_weight: Everything it stores, over ``weights``.
        relative_error: ``‖Ŵ - W‖² / ‖W‖²``, channels weighted by E[a²]; NaN where the method's latents are no weight.
        facts: Figures of the method by name, and the names of those that are worth a picture.
    """

    name: str
    block: int
    projection: str
    weights: int
    bits_per_weight: float
    relative_error: float
    facts: Mapping[str, float] = field(default_factory=dict)
    drawn: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Run:
    """One run of ``usllm-train``.

    Attributes:
        name: Its folder, below what all runs have in common.
        place: Where it was read from: a folder, or an address.
        status: ``finished``, ``interrupted``, ``failed`` or ``running``.
        model: The dense model that it began with.
        dense: Whether it was finetuned dense, without a sketch.
        overrides: What was asked for besides the defaults, ``key=value``.
        bits_asked: Ceiling in bits per compressed weight.
        bits, bits_with_entries: Achieved, metadata included; without and with the JSON entries of tensors.
        model_bits: Over all parameters.
        bytes: Of the packed model.
        dense_bytes: Of the dense model in bf16.
        rows: Rows of the sketch.
        allocation: How bits were shared out.
        objective: What was minimised; training losses of different objectives do not compare.
        perplexity: By test text.
        curves: Metrics over steps.
        steps, tokens: Optimizer steps made, and tokens trained on.
        seconds: Of training.
        seed: Random seed.
        layers: The compressed layers.
        blocks: What reconstruction has found, a row for each block.
        warnings: Of the health checks, and notes about what could not be read.
        machine: What it ran on, as in ``report.json``.
        command: What was typed.
        config: The configuration, resolved where it is known resolved.
    """

    name: str
    place: str
    status: str
    model: str = "unknown model"
    dense: bool = False
    overrides: tuple[str, ...] = ()
    bits_asked: float | None = None
    bits_with_entries: float | None = None
    bits: float | None = None
    model_bits: float | None = None
    bytes: int | None = None
    dense_bytes: int | None = None
    rows: int | None = None
    allocation: str | None = None
    objective: str | None = None
    perplexity: Mapping[TestText, Perplexities] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    seed: int | None = None
    layers: tuple[Layer, ...] = ()
    blocks: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def tokens_per_step(self) -> float | None:
        """Tokens of one optimizer step, where known."""
        return self.tokens / self.steps if self.tokens and self.steps else None

    def finetuned(self, text: TestText) -> float | None:
        """Perplexity after finetuning; ``None`` where it was not measured or is not a number."""
        value = self.perplexity.get(text, Perplexities()).finetuned
        return value if value is not None and math.isfinite(value) else None


def record(
    name: str,
    place: str,
    status: str,
    report: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    curves: Mapping[str, Curve] | None = None,
    warnings: Iterable[str] = (),
) -> Run:
    """The record of a run.

    Args:
        name: Its name.
        place: Where it was read from.
        status: How it ended.
        report: The content of ``report.json``, or as much as there is of it.
        config: Its configuration, ``report["config"]`` or from elsewhere.
        overrides: What was asked for.
        curves: Metrics over steps.
        warnings: What the reader has to say about it.
    """
    curves = curves or {}
    bits, size, sketch = (_mapping(report.get(key)) for key in ("bits_per_weight", "bytes", "compression"))
    asked = _mapping(config.get("sketch"))
    dense = finetuned_dense(report, config)
    steps = report.get("steps") or max((curve.steps[-1] for curve in curves.values() if curve.steps), default=None)
    tokens = report.get("tokens") or (steps * per_step if steps and (per_step := tokens_per_step(config)) else None)
    health = _mapping(report.get("health"))
    found = [f"{w.get('message')} (step {w.get('step')})" for w in _mappings(health.get("warnings"))]
    found += [str(line) for line in report.get("warnings") or []]
    return Run(
        name=name,
        place=place,
        status=status,
        model=model_name(config),
        dense=dense,
        overrides=tuple(overrides),
        bits_asked=None if dense else _number(bits.get("asked", asked.get("bits_per_weight"))),
        bits=_number(bits.get("achieved")),
        bits_with_entries=_number(bits.get("with_entries")),
        model_bits=_number(bits.get("model")),
        bytes=size.get("sketched"),
        dense_bytes=size.get("dense_bf16"),
        rows=None if dense else _whole(asked.get("rows")),
        allocation=None if dense else _mapping(config.get("allocation")).get("name"),
        objective=_mapping(config.get("objective")).get("name"),
        perplexity=perplexities(_mappings(report.get("perplexity"))),
        curves=curves,
        steps=steps,
        tokens=tokens,
        seconds=_number(_mapping(report.get("seconds")).get("training")),
        seed=config.get("seed"),
        layers=tuple(_layer(entry) for entry in _mappings(sketch.get("layers"))),
        blocks=tuple(_mappings(_mapping(report.get("stages")).get("reconstruct"))),
        warnings=(*warnings, *found),
        machine=_mapping(report.get("machine")),
        command=str(report.get("command", "")),
        config=config,
    )


def perplexities(rows: Iterable[Mapping[str, Any]]) -> dict[TestText, Perplexities]:
    """Perplexities by test text, from the rows of a report."""
    found = {}
    for row in rows:
        window, windows, tokens = (_whole(row.get(key)) or 0 for key in ("window", "windows", "tokens"))
        text = TestText(str(row.get("test_set")), window, windows, tokens, str(row.get("window_start", "none")))
        found[text] = Perplexities(**{stage: _number(with_todays_names(row).get(stage)) for stage in HEADINGS})
    return found


def finetuned_dense(report: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a run finetunes the dense model: its report counts no bits, or its stages allocate nothing."""
    if report.get("finished"):
        return report.get("bits_per_weight") is None
    stages, callbacks = config.get("stages"), config.get("callbacks")
    if isinstance(stages, Mapping):
        return not stages.get("allocate")
    return isinstance(callbacks, Mapping) and not callbacks.get("importance_calibration")  # before there were stages


def tokens_per_step(config: Mapping[str, Any]) -> int | None:
    """Tokens of one optimizer step on one device, from a configuration."""
    data, trainer = _mapping(config.get("data")), _mapping(config.get("trainer"))
    factors = (data.get("batch_size"), data.get("context_length"), trainer.get("accumulate_grad_batches", 1))
    return math.prod(factors) if all(isinstance(factor, int) for factor in factors) else None


def model_name(config: Mapping[str, Any]) -> str:
    """The dense model of a configuration, as users call it."""
    model = _mapping(config.get("model"))
    name = str(model.get("name") or model.get("file") or "unknown model")
    return f"{name} ({model['revision']})" if model.get("revision") else name


def _layer(entry: Mapping[str, Any]) -> Layer:
    name = str(entry.get("name"))
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.)", name)
    shape = entry.get("shape") or (0, 0)
    weights = int(shape[0]) * int(shape[1])
    facts = _mapping(entry.get("facts")) or _old_facts(entry, weights)
    values = {key: _number(_mapping(fact).get("value")) for key, fact in facts.items()}
    return Layer(
        name=name,
        block=int(numbers[-1]) if numbers else 0,
        projection=name.rpartition(".")[2].removesuffix("_proj"),
        weights=weights,
        bits_per_weight=float(entry.get("bits_per_weight", math.nan)),
        relative_error=math.nan if (error := entry.get("relative_error")) is None else float(error),
        facts={key: value for key, value in values.items() if value is not None},
        drawn=tuple(key for key, fact in facts.items() if _mapping(fact).get("drawn")),
    )


def _old_facts(entry: Mapping[str, Any], weights: int) -> dict[str, dict[str, Any]]:
    """Facts of a layer in a report of an earlier version, which knew the sketch alone and named its figures itself."""
    found: dict[str, dict[str, Any]] = {"occupancy": {"value": entry.get("occupancy")}}
    if weights:
        found["states_per_weight"] = {"value": int(entry.get("states", 0)) / weights, "drawn": True}
    if classes := entry.get("classes"):
        channels = sum(each[3] for each in classes)
        kept = sum(each[3] for each in classes if each[1]) / channels if channels else None
        found["channels_with_states"] = {"value": kept, "drawn": True}
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _whole(value: Any) -> int | None:
    """A whole number; in a configuration that is not resolved a reference may stand in its place."""
    return value if isinstance(value, int) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
