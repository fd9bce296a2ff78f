"""What a run must share with the checkpoint that it continues: the sketch, and all that decides its course."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from usllm.compress import Compressor
from usllm.compress.registry import from_checkpoint_section

_CONFIG_KEYS = {
    "allocation": "allocation.name",
    "layer_budget": "allocation.layer_budget",
    "min_importance": "allocation.min_importance",
    "price_list": "allocation.price_list",
    "price_exponent": "allocation.price_exponent",
}
"""Options of methods that the configuration tree keeps outside of ``sketch``."""
_NEWER_PATTERNS = {"qkv_proj", "gate_up_proj"}
"""Default patterns that were added later: a checkpoint without them continues."""
_DECISIVE_KEYS = (
    "seed",
    "model.kind",
    "model.name",
    "model.file",
    "model.revision",
    "data.train",
    "data.mixture",
    "data.validation",
    "data.validation_fraction",
    "data.context_length",
    "data.max_sequences",
    "data.window_start",
    "data.shuffle_buffer",
    "data.validation_documents",
    "objective",
    "optimizer",
    "trainer.max_steps",
    "trainer.epochs",
    "trainer.tokens",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "trainer.precision",
    "callbacks.sketch_reprojection",
)
"""Parts of the run's configuration that a resumed run must keep, besides the sketch. All others only store, show or
measure what happens, or say on which machines: of batch size, accumulation and number of ranks only the product, the
sequences of an optimizer step, must be kept."""
_MIXTURE = "data.mixture"
_PLACE_OF_TEXT = re.compile(r"data\.(train|validation|mixture\..+)\.path")
ADDED_LATER: Mapping[str, Any] = {
    "data.window_start": "none",
    "data.shuffle_buffer": 4096,
    "data.validation_documents": 500,
    "data.train.streaming": False,
    "data.validation.streaming": False,
    "evaluation.window_start": "none",
    "evaluation.allow_shared": [],
    "optimizer.until": 1.0,
}
"""Keys that configurations of older versions lack, with what those versions did."""


def compression_differences(saved: Mapping[str, Any], compressor: Compressor, patterns: Sequence[str]) -> list[str]:
    """Every key in which a checkpoint's compression differs from this run's, with both values.

    An option that the checkpoint lacks was added later: it counts as its default.
    """
    theirs = from_checkpoint_section(saved)
    if theirs.method != compressor.method:
        return [f"sketch.method: {theirs.method} in the checkpoint, {compressor.method} in this run"]
    before, now = dataclasses.asdict(theirs.options), dataclasses.asdict(compressor.options)
    differences = [
        f"{_CONFIG_KEYS.get(key, f'sketch.{key}')}: {before[key]} in the checkpoint, {now[key]} in this run"
        for key in sorted(now)
        if before[key] != now[key]
    ]
    # Whether the patterns find the same layers is seen when their plans are loaded; the newer ones find none in a model
    # that older runs could sketch.
    if set(saved["patterns"]) - _NEWER_PATTERNS != set(patterns) - _NEWER_PATTERNS:
        differences.append(f"model.patterns: {saved['patterns']} in the checkpoint, {list(patterns)} in this run")
    return differences


def run_differences(
    saved: Mapping[str, Any],
    config: Mapping[str, Any],
    saved_ranks: int | None = None,
    ranks: int | None = None,
    texts_compared: bool = False,
) -> list[str]:
    """Every key besides the sketch that decides the course of a run and differs, with both values.

    Args:
        saved: the configuration in the checkpoint. A key that it lacks counts as null, or as ``ADDED_LATER`` says.
        config: this run's.
        saved_ranks: number of processes that made the checkpoint; ``None``: as far as its configuration says.
        ranks: the same of this run.
        texts_compared: whether the texts themselves are compared elsewhere: then it does not matter where they lie.
    """
    before_names, names = _mixed(saved), _mixed(config)
    later = {**ADDED_LATER, **{f"{_MIXTURE}.{name}.streaming": False for name in {*before_names, *names}}}
    theirs, ours = {**later, **dict(_leaves(saved))}, {**later, **dict(_leaves(config))}
    decisive = tuple(f"{key}." for key in _DECISIVE_KEYS if key != _MIXTURE or before_names == names)
    differences = [
        f"{key}: {theirs.get(key)} in the checkpoint, {ours.get(key)} in this run"
        for key in sorted(theirs.keys() | ours.keys())
        if f"{key}.".startswith(decisive)
        and not (texts_compared and _PLACE_OF_TEXT.fullmatch(key))
        and not agree(key, theirs.get(key), ours.get(key))
    ]
    if before_names != names:  # texts take their turns in the order in which they are named
        shown = [", ".join(given) or "none" for given in (before_names, names)]
        differences.append(f"{_MIXTURE}: {shown[0]} in the checkpoint, {shown[1]} in this run")
    before, now = _step_size(theirs, saved_ranks), _step_size(ours, ranks)
    if before is not None and now is not None and before.sequences != now.sequences:
        differences.append(
            "sequences of an optimizer step (data.batch_size x trainer.accumulate_grad_batches x ranks): "
            f"{before} in the checkpoint, {now} in this run; any split of {before.sequences} will do"
        )
    return differences


def agree(key: str, theirs: Any, ours: Any) -> bool:
    """Whether a key's values in two configurations, theirs older, are one; ``ADDED_LATER`` completes the older one.

    ``window_start=auto`` asks for nothing: it is what a run has resolved it to.
    """
    if key in ADDED_LATER:
        theirs = ADDED_LATER[key] if theirs is None else theirs
        if key.endswith(".window_start") and ours == "auto":
            return True
    return bool(theirs == ours)


class _StepSize(NamedTuple):
    batch_size: int
    accumulate: int
    ranks: int

    @property
    def sequences(self) -> int:
        return self.batch_size * self.accumulate * self.ranks

    def __str__(self) -> str:
        return f"{self.batch_size} x {self.accumulate} x {self.ranks} = {self.sequences}"


def _step_size(leaves: Mapping[str, Any], ranks: int | None) -> _StepSize | None:
    """What a configuration says about the sequences of a step; ``None`` where it leaves that open."""
    batch_size, accumulate = leaves.get("data.batch_size"), leaves.get("trainer.accumulate_grad_batches", 1)
    if ranks is None:
        devices = leaves.get("trainer.devices", 1)
        devices = len(devices) if isinstance(devices, list) else devices
        if not isinstance(devices, int) or devices < 1:  # auto, -1: as many as the machine has
            return None
        ranks = devices * int(leaves.get("trainer.num_nodes", 1))
    if not isinstance(batch_size, int) or not isinstance(accumulate, int):
        return None
    return _StepSize(batch_size, accumulate, ranks)


def _mixed(config: Mapping[str, Any]) -> list[str]:
    """Names of the texts that are mixed in, in their order."""
    return list((config.get("data") or {}).get("mixture") or {})


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dictionaries; lists are values."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
