"""Every mistake in the model group is named with its key and the way out."""

from __future__ import annotations

import pytest

from usllm.models import ModelSpec


def test_default_is_usable() -> None:
    assert ModelSpec().problems() == []


def test_patterns_become_a_tuple() -> None:
    assert ModelSpec(patterns=["q_proj"]) == ModelSpec(patterns=("q_proj",))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ModelSpec(kind="onnx"), ["model.kind='onnx'", "gguf_package"]),
        (ModelSpec(kind="gguf"), ["model.file"]),
        (ModelSpec(kind="folder", name=None), ["model.name"]),
        (ModelSpec(kind="random", name="bert"), ["'bert'", "qwen3"]),
        (ModelSpec(revision="v1"), ["model.revision='v1'", "hub"]),
        (ModelSpec(patterns=[]), ["model.patterns"]),
    ],
)
def test_problem_names_key_and_way_out(spec: ModelSpec, words: list[str]) -> None:
    problems = spec.problems()
    assert len(problems) == 1
    assert all(word in problems[0] for word in words)


def test_all_problems_are_found_at_once() -> None:
    assert len(ModelSpec(kind="gguf", revision="x", patterns=[]).problems()) == 3
