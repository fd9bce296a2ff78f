"""Which differences keep a run from continuing a checkpoint, and which do not."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from usllm.compress import DEFAULT_PATTERNS, as_compressor, to_section
from usllm.sketch import SketchConfig
from usllm.training.differences import compression_differences, run_differences

RUN: dict[str, Any] = {
    "seed": 0,
    "name": "tiny",
    "model": {"kind": "random", "name": "llama"},
    "data": {"train": {"kind": "text", "path": ["a.txt"]}, "context_length": 32, "batch_size": 2, "cache_dir": "/a"},
    "objective": {"name": "cross_entropy"},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "trainer": {"max_steps": 8, "accumulate_grad_batches": 1, "log_every_n_steps": 1, "accelerator": "cpu"},
    "callbacks": {"sketch_reprojection": {"every_n_steps": 1}, "progress": {"_target_": "Bar"}},
    "evaluation": {"windows": [32]},
    "logger": {"csv": {"_target_": "CSVLogger"}},
}


def run_with(key: str, value: Any) -> dict[str, Any]:
    """``RUN`` with one dotted key set."""
    changed = copy.deepcopy(RUN)
    *groups, last = key.split(".")
    inner = changed
    for group in groups:
        inner = inner[group]
    inner[last] = value
    return changed


@pytest.mark.parametrize(
    ("key", "value", "before"),
    [
        ("seed", 1, 0),
        ("model.name", "qwen2", "llama"),
        ("data.train.path", ["a.txt", "b.txt"], ["a.txt"]),
        ("data.train.separator", "\t", None),
        ("data.validation_fraction", 0.5, None),
        ("data.context_length", 64, 32),
        ("objective.name", "distill", "cross_entropy"),
        ("optimizer.lr", 1e-4, 1e-3),
        ("optimizer.betas", [0.9, 0.99], [0.9, 0.95]),
        ("trainer.max_steps", 9, 8),
        ("trainer.tokens", 1024, None),
        ("trainer.precision", "bf16-mixed", None),
        ("callbacks.sketch_reprojection.every_n_steps", 2, 1),
    ],
)
def test_key_that_decides_the_course_of_a_run_is_named_with_both_values(key: str, value: Any, before: Any) -> None:
    assert run_differences(RUN, run_with(key, value)) == [f"{key}: {before} in the checkpoint, {value} in this run"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "other"),
        ("resume", True),
        ("data.cache_dir", "/b"),
        ("data.num_proc", 8),
        ("data.num_workers", 2),
        ("trainer.strategy", "fsdp2"),
        ("trainer.log_every_n_steps", 5),
        ("trainer.accelerator", "gpu"),
        ("trainer.enable_model_summary", True),
        ("callbacks.progress", None),
        ("evaluation.windows", [64]),
        ("logger", {}),
        ("data.max_sequences", None),  # a key that came after the checkpoint
    ],
)
def test_what_only_stores_shows_or_measures_may_change_on_resume(key: str, value: Any) -> None:
    assert run_differences(RUN, run_with(key, value)) == []


MIXED = {"a": {"path": "a.txt", "share": 0.5}, "b": {"path": "b.txt", "share": 0.1, "streaming": False}}


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        (MIXED | {"a": {"path": "a.txt", "share": 0.25}}, "data.mixture.a.share: 0.5 in the checkpoint, 0.25 in this"),
        ({"b": MIXED["b"], "a": MIXED["a"]}, "data.mixture: a, b in the checkpoint, b, a in this run"),
        ({"a": MIXED["a"]}, "data.mixture: a, b in the checkpoint, a in this run"),
        ({}, "data.mixture: a, b in the checkpoint, none in this run"),
        (None, "data.mixture: a, b in the checkpoint, none in this run"),
        (MIXED | {"a": {**MIXED["a"], "streaming": True}}, "data.mixture.a.streaming: False in the checkpoint, True"),
        (MIXED | {"a": {**MIXED["a"], "path": "c.txt"}}, "data.mixture.a.path: a.txt in the checkpoint, c.txt in this"),
    ],
)
def test_mixture_decides_by_its_shares_names_and_order(mixture: Any, words: str) -> None:
    (found,) = run_differences(run_with("data.mixture", MIXED), run_with("data.mixture", mixture))
    assert found.startswith(words)


def test_places_of_a_mixture_may_change_where_texts_are_compared_and_older_ones_never_stream() -> None:
    moved = {name: {**source, "path": "/elsewhere", "streaming": False} for name, source in MIXED.items()}
    before, now = run_with("data.mixture", MIXED), run_with("data.mixture", moved)
    assert run_differences(before, now, texts_compared=True) == []
    assert len(run_differences(before, now)) == 2
    assert run_differences(RUN, run_with("data.mixture", {})) == []
    (found,) = run_differences(RUN, before)
    assert found == "data.mixture: none in the checkpoint, a, b in this run"


STEP = "sequences of an optimizer step (data.batch_size x trainer.accumulate_grad_batches x ranks)"


def split(batch_size: int, accumulate: int, devices: Any = 1, nodes: int = 1) -> dict[str, Any]:
    """``RUN`` with its steps split in another way."""
    changed = run_with("data.batch_size", batch_size)
    trainer = {"accumulate_grad_batches": accumulate, "devices": devices, "num_nodes": nodes}
    changed["trainer"].update(trainer)
    return changed


@pytest.mark.parametrize(
    "other", [split(1, 2), split(1, 1, 2), split(1, 1, [0, 1]), split(1, 1, 1, 2), split(8, 8, "auto"), split(8, 8, -1)]
)
def test_steps_of_as_many_sequences_may_be_split_in_another_way(other: dict[str, Any]) -> None:
    assert run_differences(RUN, other) == []


@pytest.mark.parametrize(
    ("other", "shown"),
    [(split(4, 1), "4 x 1 x 1 = 4"), (split(2, 3), "2 x 3 x 1 = 6"), (split(2, 1, 2), "2 x 1 x 2 = 4")],
)
def test_steps_of_other_numbers_of_sequences_are_named(other: dict[str, Any], shown: str) -> None:
    (found,) = run_differences(RUN, other)
    assert found.startswith(f"{STEP}: 2 x 1 x 1 = 2 in the checkpoint, {shown} in this run")


def test_number_of_ranks_as_counted_wins_over_the_configuration() -> None:
    assert run_differences(RUN, split(1, 1, "auto"), saved_ranks=1, ranks=2) == []
    (found,) = run_differences(RUN, split(1, 1, "auto"), saved_ranks=1, ranks=4)
    assert "1 x 1 x 4 = 4 in this run" in found


def test_key_under_another_group_of_the_same_beginning_does_not_count() -> None:
    # data.train decides, data.train_cache would not.
    assert run_differences({"data": {"train_cache": 1}, "seeds": 1}, {"data": {"train_cache": 2}, "seeds": 2}) == []


def test_group_that_one_side_lacks_is_named_key_by_key() -> None:
    dense = run_with("callbacks.sketch_reprojection", None)
    assert run_differences(RUN, dense) == [
        "callbacks.sketch_reprojection.every_n_steps: 1 in the checkpoint, None in this run"
    ]


def test_same_run_has_no_differences() -> None:
    assert run_differences(RUN, copy.deepcopy(RUN)) == []


def test_sketch_keys_are_called_as_the_configuration_calls_them() -> None:
    saved = {"sketch": dataclasses.asdict(SketchConfig(rows=2)), "patterns": ["q_proj", "k_proj"]}
    found = compression_differences(
        saved, as_compressor(SketchConfig(rows=3, min_importance=0.5, layer_budget="importance")), ["q_proj"]
    )
    assert [line.partition(":")[0] for line in found] == [
        "allocation.layer_budget",
        "allocation.min_importance",
        "sketch.rows",
        "model.patterns",
    ]
    assert compression_differences(saved, as_compressor(SketchConfig(rows=2)), ["k_proj", "q_proj"]) == []


def test_checkpoint_from_before_fused_projections_were_among_the_default_patterns_continues() -> None:
    older = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    saved = {"sketch": dataclasses.asdict(SketchConfig()), "patterns": older}
    assert compression_differences(saved, as_compressor(SketchConfig()), DEFAULT_PATTERNS) == []
    assert compression_differences(saved, as_compressor(SketchConfig()), [*DEFAULT_PATTERNS, "o_proj"]) != []


def test_checkpoints_of_both_formats_say_the_same() -> None:
    ours = as_compressor(SketchConfig(rows=2))
    patterns = ["q_proj"]
    old = {"sketch": dataclasses.asdict(SketchConfig(rows=2)), "patterns": patterns}
    del old["sketch"]["layer_budget"]  # an option that came later counts as its default
    new = {"compressor": to_section(ours), "patterns": patterns}
    assert compression_differences(old, ours, patterns) == compression_differences(new, ours, patterns) == []
