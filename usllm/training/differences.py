"""What a run must share with the checkpoint that it continues: the sketch, and all that decides its course."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from usllm.sketch import SketchConfig

_CONFIG_KEYS = {
    "allocation": "allocation.name",
    "layer_budget": "allocation.layer_budget",
    "min_importance": "allocation.min_importance",
}
"""Fields of ``SketchConfig`` that the configuration tree keeps outside of ``sketch``."""
_DECISIVE_KEYS = (
    "seed",
    "model.kind",
    "model.name",
    "model.file",
    "model.revision",
    "data.train",
    "data.validation",
    "data.validation_fraction",
    "data.context_length",
    "data.max_sequences",
    "data.batch_size",
    "data.num_workers",
    "objective",
    "optimizer",
    "trainer.max_steps",
    "trainer.epochs",
    "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "trainer.precision",
    "trainer.devices",
    "trainer.num_nodes",
    "callbacks.sketch_reprojection",
)
"""Parts of the run's configuration that a resumed run must keep, besides the sketch. All others only store, show or
measure what happens, or say on which machine."""


def sketch_differences(saved: Mapping[str, Any], sketch: SketchConfig, patterns: Sequence[str]) -> list[str]:
    """Every key in which a checkpoint's sketch differs from this run's, with both values."""
    absent = "(none)"
    theirs, ours = saved["sketch"], dataclasses.asdict(sketch)
    differences = [
        f"{_CONFIG_KEYS.get(key, f'sketch.{key}')}: {theirs.get(key, absent)} in the checkpoint, "
        f"{ours.get(key, absent)} in this run"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key, absent) != ours.get(key, absent)
    ]
    if sorted(saved["patterns"]) != sorted(patterns):
        differences.append(f"model.patterns: {saved['patterns']} in the checkpoint, {list(patterns)} in this run")
    return differences


def run_differences(saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Every key besides the sketch that decides the course of a run and differs, with both values.

    Args:
        saved: the configuration in the checkpoint. A key that it lacks counts as null: it was added later.
        config: this run's.
    """
    theirs, ours = dict(_leaves(saved)), dict(_leaves(config))
    decisive = tuple(f"{key}." for key in _DECISIVE_KEYS)
    return [
        f"{key}: {theirs.get(key)} in the checkpoint, {ours.get(key)} in this run"
        for key in sorted(theirs.keys() | ours.keys())
        if f"{key}.".startswith(decisive) and theirs.get(key) != ours.get(key)
    ]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dictionaries; lists are values."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
