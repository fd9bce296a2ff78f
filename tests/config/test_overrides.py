"""Beside a checkpoint an override changes what it names and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from composing import composed

from usllm.config import EvaluationConfig, check_eval, evaluation_of_run
from usllm.config.overrides import key_of
from usllm.config.packed import check_export
from usllm.system.errors import UserError

RUN: dict[str, Any] = {
    "evaluation": {
        "test_sets": {
            "wiki": {"kind": "hub", "name": "Salesforce/wikitext", "separator": "\n\n"},
            "own": {"kind": "pydoc", "text_field": "body"},
        },
        "windows": [64, 256],
        "max_windows": 3,
        "precision": "bf16",
        "validation_split": False,
        "window_start": "each",
    }
}


def evaluation(*overrides: str) -> EvaluationConfig:
    config = check_eval(composed("ckpt=runs/x", *overrides, command="eval"), overrides)
    return evaluation_of_run(RUN, config.evaluation, overrides)


def leaves(section: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(section, dict):
        return {prefix: section}
    return {key: value for name, part in section.items() for key, value in leaves(part, f"{prefix}.{name}").items()}


def plain(config: EvaluationConfig) -> dict[str, Any]:
    import dataclasses

    return leaves(dataclasses.asdict(config), "evaluation")


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ([], {}),
        (["evaluation.precision=fp32"], {"evaluation.precision": "fp32"}),
        (["evaluation.windows=[32]"], {"evaluation.windows": [32]}),
        (["evaluation.max_windows=null"], {"evaluation.max_windows": None}),
        (["evaluation.batch_size=4"], {"evaluation.batch_size": 4}),
        (["evaluation.validation_split=true"], {"evaluation.validation_split": True}),
        (["evaluation.window_start=none"], {"evaluation.window_start": "none"}),
        (["+evaluation.test_sets.wiki.split=test"], {"evaluation.test_sets.wiki.split": "test"}),
        (
            ["evaluation.precision=fp32", "++evaluation.windows=[16]"],
            {"evaluation.precision": "fp32", "evaluation.windows": [16]},
        ),
    ],
)
def test_an_override_changes_what_it_names_and_nothing_else(overrides: list[str], changed: dict[str, Any]) -> None:
    before, after = plain(evaluation()), plain(evaluation(*overrides))
    assert {key: value for key, value in after.items() if before.get(key) != value} == changed
    assert before.keys() - after.keys() == set()


def test_a_test_set_is_added_to_those_of_the_run() -> None:
    found = evaluation("+evaluation.test_sets.mine.kind=pydoc")
    assert list(found.test_sets) == ["wiki", "own", "mine"]
    assert found.windows == [64, 256]


def test_a_test_set_given_with_its_kind_keeps_nothing_of_its_namesake() -> None:
    assert evaluation("+evaluation.test_sets.own.kind=pydoc").test_sets["own"].text_field == "text"


def test_null_removes_a_test_set() -> None:
    assert list(evaluation("+evaluation.test_sets.wiki=null").test_sets) == ["own"]


def test_an_option_of_the_group_names_all_of_it(tmp_path: Any) -> None:
    (tmp_path / "a.txt").write_text("a")
    found = evaluation("evaluation=files", f"evaluation.test_sets.text.path={tmp_path / 'a.txt'}")
    assert (list(found.test_sets), found.windows, found.precision) == (["text"], [512], "auto")


@pytest.mark.parametrize("override", ["a.b=1", "+a.b=1", "++a.b=1", "~a.b", "a.b='x=y'"])
def test_key_of_every_form_of_an_override(override: str) -> None:
    assert key_of(override) == "a.b"


CKPT, SET = "ckpt=x", "+evaluation.test_sets.p.kind=pydoc"

IDLE = [
    # command, overrides that are right, one that has no effect beside them, the way out
    ("eval", [CKPT], "model=random", "ckpt=x decides that; leave it out"),
    ("eval", [CKPT], "model.name=llama", "ckpt=x decides that; leave it out"),
    ("eval", [SET], "harness.limit=5", "name some with harness.tasks"),
    ("eval", [SET], "harness.num_fewshot=1", "name some with harness.tasks"),
    ("eval", [SET], "evaluation.validation_split=true", "only a run has a validation split"),
    ("eval", ["harness.tasks=[t]"], "evaluation.windows=[64]", "no perplexity is measured"),
    ("eval", ["harness.tasks=[t]"], "evaluation.max_windows=4", "no perplexity is measured"),
    ("eval", ["harness.tasks=[t]"], "evaluation.window_start=each", "no perplexity is measured"),
    ("export", ["out=x", CKPT], "model=random", "ckpt=x decides that; leave it out"),
    ("export", ["out=x", CKPT], "data=pydoc", "ckpt=x decides that; leave it out"),
    ("export", ["out=x", CKPT], "calibration_sequences=4", "ckpt=x decides that; leave it out"),
    ("export", ["out=x"], "evaluation.windows=[64]", "pass measure=true"),
]


@pytest.mark.parametrize(("command", "right", "idle", "way_out"), IDLE)
def test_override_without_an_effect_is_refused(command: str, right: list[str], idle: str, way_out: str) -> None:
    check = check_eval if command == "eval" else check_export
    given = [*right, idle]
    with pytest.raises(UserError) as refused:
        check(composed(*given, command=command), given)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(idle)
    assert way_out in line
    check(composed(*right, command=command), right)
