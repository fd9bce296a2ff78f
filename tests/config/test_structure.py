"""Merging into dataclasses collects every mismatch and keeps what fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from usllm.config.structure import merge_typed, merge_values, typed_arguments


@dataclass(frozen=True)
class Part:
    size: int = 3
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"part.size={self.size}: negative")


@dataclass
class Whole:
    name: str
    part: Part = field(default_factory=Part)
    spare: Part | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    limit: int | None = None


@dataclass
class Free:
    settings: dict[str, Any] = field(default_factory=dict)


def test_nested_sections_lists_and_dictionaries_are_built() -> None:
    problems: list[str] = []
    whole = merge_typed(
        Whole,
        {"name": "x", "part": {"size": 4}, "parts": {"a": {"share": 1}, "gone": None}, "numbers": [1, 2], "limit": 7},
        problems,
    )
    assert problems == []
    assert whole == Whole("x", Part(4), None, {"a": Part(share=1.0)}, [1, 2], 7)


def test_every_mismatch_is_reported_with_its_full_key() -> None:
    problems: list[str] = []
    merge_typed(Whole, {"name": "x", "part": {"size": "many", "share": "half"}, "limits": 3}, problems)
    assert [line.split(":")[0] for line in problems] == ["part.size=many", "part.share=half", "limits=3"]
    assert "did you mean limit?" in problems[2]


def test_a_refused_value_leaves_the_default_to_the_other_rules() -> None:
    problems: list[str] = []
    whole = merge_typed(Whole, {"name": "x", "part": {"size": "many", "share": 0.25}}, problems)
    assert whole is not None
    assert whole.part == Part(3, 0.25)


def test_a_missing_required_value_is_reported_once() -> None:
    for given in ({}, {"name": "???"}):
        problems: list[str] = []
        merge_typed(Whole, given, problems)
        assert len(problems) == 1
        assert problems[0].startswith("name: needs a value")


def test_what_a_dataclass_refuses_becomes_a_problem() -> None:
    problems: list[str] = []
    assert merge_typed(Part, {"size": -1}, problems, "part.") is None
    assert problems == ["part.size=-1: negative"]


def test_a_value_in_place_of_a_group_is_reported() -> None:
    problems: list[str] = []
    merge_typed(Whole, {"name": "x", "part": 5, "parts": {"a": 6}}, problems)
    assert [line.split(":")[0] for line in problems] == ["part=5", "parts.a=6"]


def test_excluded_fields_are_unknown_keys() -> None:
    problems: list[str] = []
    assert merge_values(Part, {"size": 1, "share": 1.0}, problems, exclude=["share"]) == {"size": 1}
    assert len(problems) == 1


def run(length: str | timedelta | dict[str, int] | None = None, groups: dict[str, Any] | None = None) -> None:
    """A function whose arguments are checked."""


@pytest.mark.parametrize("length", ["00:12:00:00", {"days": 1}, None])
def test_argument_that_may_be_a_text_or_a_group_takes_both(length: Any) -> None:
    problems: list[str] = []
    given = {"length": length, "groups": None}
    assert typed_arguments(run, given, "timer", problems) == given
    assert problems == []
    typed_arguments(run, {"length": length, "groups": 3}, "timer", problems)
    assert problems == ["timer.groups=3: must be a group of settings"]


def folder(path: str | None = None, depth: int = 1, factor: float = 1.0, names: list[str] | None = None) -> None:
    """A function whose arguments are checked."""


@pytest.mark.parametrize(
    ("given", "value"),
    [({"path": 0}, "0"), ({"path": None}, None), ({"depth": "3"}, 3), ({"factor": 2}, 2.0), ({"names": ["a"]}, ["a"])],
)
def test_argument_has_the_type_that_is_annotated(given: dict[str, Any], value: Any) -> None:
    problems: list[str] = []
    ((found),) = typed_arguments(folder, given, "folder", problems).values()
    assert problems == []
    assert (found, type(found)) == (value, type(value))


def test_text_in_a_group_of_anything_is_left_as_it_is() -> None:
    values = merge_values(Free, {"settings": {"name": "${"}}, problems := [])
    assert (problems, values["settings"]) == ([], {"name": "${"})
