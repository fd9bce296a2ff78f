"""The order of stages is checked before anything is done."""

from __future__ import annotations

from typing import ClassVar

import pytest

from usllm.stages import Allocate, Calibrate, Preparation, Reconstruct, Stage, Start, Work
from usllm.system.errors import UserError


class Mine(Stage):
    """A stage that says nothing about its place."""

    name = "mine"

    def run(self, work: Work) -> None:
        """Nothing."""


class Before(Mine):
    """A stage that works on the dense weights."""

    after: ClassVar[tuple[str, ...]] = ()


class Looking(Mine):
    """A stage that only looks."""

    on_dense: ClassVar[bool] = True


DEFAULT = [Calibrate(), Allocate(), Start()]


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        ([Mine(), *DEFAULT], "mine needs start before it, the list is mine, calibrate, allocate, start"),
        ([Mine()], "mine needs start before it"),
        ([Reconstruct(), *DEFAULT], "reconstruct needs start before it"),
        ([Calibrate(), Start(), Allocate()], "start needs allocate before it"),
        ([Allocate(), Start()], "allocate needs calibrate before it"),
    ],
    ids=lambda value: "-".join(stage.name for stage in value) if isinstance(value, list) else "",
)
def test_stage_before_one_that_must_have_run_is_refused_in_one_line(stages: list[Stage], line: str) -> None:
    with pytest.raises(UserError) as refused:
        Preparation(stages)
    assert str(refused.value).startswith(f"stages: {line}")
    assert "stages=[default,reconstruct]" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "stages",
    [
        [*DEFAULT, Mine()],
        [Before(), *DEFAULT],
        [Before()],
        [*DEFAULT, Looking()],
        [Allocate(), Start(), Calibrate()],
        [],
    ],
    ids=lambda stages: "-".join(type(stage).__name__ for stage in stages),
)
def test_other_orders_are_taken(stages: list[Stage]) -> None:
    assert Preparation(stages).stages == stages
