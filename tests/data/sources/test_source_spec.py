"""Every mistake in a source is named with its key and the way out."""

from __future__ import annotations

import pytest

from usllm.data import SourceSpec


def test_default_is_usable() -> None:
    assert SourceSpec().problems("data.train") == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (SourceSpec(kind="csv"), ["data.train.kind='csv'", "parquet"]),
        (SourceSpec(kind="text"), ["data.train.path"]),
        (SourceSpec(kind="jsonl", path=[]), ["data.train.path"]),
        (SourceSpec(kind="hub"), ["data.train.name"]),
        (SourceSpec(kind="text", path="a", separator=""), ["data.train.separator"]),
        (SourceSpec(document_start="("), ["data.train.document_start='('", "regular expression"]),
    ],
)
def test_problem_names_key_and_way_out(spec: SourceSpec, words: list[str]) -> None:
    problems = spec.problems("data.train")
    assert len(problems) == 1
    assert all(word in problems[0] for word in words)


def test_one_path_or_several() -> None:
    assert SourceSpec(path="a").paths == ("a",)
    assert SourceSpec(path=["a", "b"]).paths == ("a", "b")
    assert SourceSpec().paths == ()
