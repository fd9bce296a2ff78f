"""What the command is told is checked, and a reference is only drawn where it compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from synthetic import config, write_run

from usllm.reports.labels import texts_of
from usllm.reports.runs import Run
from usllm.reports.settings import ReferenceSettings, check_report, read_runs, references
from usllm.system.errors import UserError
from usllm.system.files import write_json


def row(name: str, window: int = 512, windows: int = 8, perplexity: float = 33.0) -> dict[str, Any]:
    return {"test_set": name, "window": window, "windows": windows, "tokens": 300_000, "perplexity": perplexity}


def test_one_place_becomes_a_list() -> None:
    assert check_report(OmegaConf.create({"runs": "a"})).runs == ["a"]
    assert check_report(OmegaConf.create({"runs": ["a", "wandb:b"]})).runs == ["a", "wandb:b"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"runs": "???"}, "runs: needs a value"),
        ({"runs": 3}, "runs=3"),
        ({"runs": []}, r"runs=\[\]"),
        ({"runs": "a", "outt": "b"}, "outt"),
        ({"runs": "a", "reference": {"bytes": "many"}}, "reference.bytes"),
        ({"runs": "a", "reference": {"bytes": 0}}, "reference.bytes=0"),
        ({"runs": "a", "reference": {"perplexity": 3, "evaluation": "x"}}, "give one of them"),
        ({"runs": "a", "out": "{file}"}, "is a file"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], named: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    if given.get("out") == "{file}":
        given = {**given, "out": str(file)}
    with pytest.raises(UserError, match=named):
        check_report(OmegaConf.create(given))


def test_a_place_given_twice_is_read_once(sweep: Path) -> None:
    assert len(read_runs([str(sweep), str(sweep / "dense"), f"{sweep}/"])) == 9


def test_runs_of_one_name_in_several_places_stay_apart(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_run(tmp_path / place / "default", config(0.5, 1, "waterfill"), steps=5)
    found = read_runs([str(tmp_path / "a" / "default"), str(tmp_path / "b")])
    assert [run.name for run in found] == ["a/default", "b/default"]


def test_a_link_to_a_run_is_the_run(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sweep / "dense")
    (run,) = read_runs([str(tmp_path / "link")])
    assert (run.name, run.place) == ("dense", str((sweep / "dense").resolve()))


def test_a_figure_for_each_test_set(runs: list[Run]) -> None:
    found = references(ReferenceSettings("Q4", {"wikitext2": 33, "imdb": 45.5}, None, 7), runs)
    (reference,) = found.values()
    assert {text.name: value for text, value in reference.perplexity.items()} == {"wikitext2": 33.0, "imdb": 45.5}
    assert (reference.name, reference.bytes) == ("Q4", 7)


def test_one_figure_serves_one_test_set(runs: list[Run]) -> None:
    text = texts_of(runs)[0]
    single = [run for run in runs if run.perplexity][:1]
    with pytest.raises(UserError, match="2 test sets"):
        references(ReferenceSettings(perplexity=33.0), single)
    only = [replace(single[0], perplexity={text: single[0].perplexity[text]})]
    (reference,) = references(ReferenceSettings(perplexity=33.0), only).values()
    assert reference.perplexity == {text: 33.0}


def test_an_evaluation_serves_where_it_was_measured_alike(runs: list[Run], tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_json(path, {"perplexity": [row("wikitext2"), row("imdb", windows=9), row("other")]})
    (reference,) = references(ReferenceSettings(evaluation=str(path)), runs).values()
    assert {text.name for text in reference.perplexity} == {"wikitext2"}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such file"),
        ({"perplexity": [row("imdb", windows=9)]}, "not measured as the runs were"),
        ({"perplexity": [{"window": 1}]}, "is not an evaluation.json"),
        ({"perplexity": 3}, "is not an evaluation.json"),
        ({}, "not measured as the runs were"),
    ],
)
def test_an_evaluation_that_does_not_compare_is_refused(
    content: Any, named: str, runs: list[Run], tmp_path: Path
) -> None:
    path = tmp_path / "evaluation.json"
    if content is not None:
        write_json(path, content)
    with pytest.raises(UserError, match=named):
        references(ReferenceSettings(evaluation=str(path)), runs)


@pytest.mark.parametrize("given", [{"wiki": 3.0}, {"imdb": "x"}, {"imdb": -1}, {"imdb": float("nan")}, "33", True])
def test_figures_that_mean_nothing_are_refused(given: Any, runs: list[Run]) -> None:
    with pytest.raises(UserError, match=r"reference\.perplexity"):
        references(ReferenceSettings(perplexity=given), runs)


def test_no_reference_by_default(runs: list[Run]) -> None:
    assert references(ReferenceSettings(), runs) == {}
