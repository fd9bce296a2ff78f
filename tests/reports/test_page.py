"""The page stands alone, says everything, and runs nothing that a name smuggles in."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import NASTY

from usllm.reports.page import machines, summary
from usllm.reports.runs import Run
from usllm.reports.writing import ReportWriter

VOID = {"meta", "link", "br", "image", "path", "use", "rect", "line"}


class Outline(HTMLParser):
    """Tags with their attributes, in order, and whether every tag was closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag, tag


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    return (written / "report.html").read_text(encoding="utf-8")


def test_every_file_is_written(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    figures = {
        *(f"perplexity_by_{kind}_{text}_window_512" for kind in ("rate", "bytes") for text in ("wikitext2", "imdb")),
        "training_curves",
        "layers_error",
        "layers_states_per_weight",
    }
    assert names == {"report.html", "table.md", *(f"{name}.{end}" for name in figures for end in ("png", "svg"))}


def test_page_is_well_formed_and_loads_nothing(page: str) -> None:
    outline = Outline(page)
    assert outline.open == []
    for tag, attributes in outline.tags:
        for key in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert "@import" not in page
    assert not re.search(r"url\((?!#|['\"]?data:)", page)


def test_page_says_everything(page: str) -> None:
    for part in (
        "A sweep",
        "9 runs: 7 finished, 1 failed, 1 interrupted.",
        "Lowest perplexity on wikitext2, window 512",
        "0.5 bpw, 3 rows, proportional",
        "sketch.bits_per_weight=0.5 sketch.rows=3",
        "perplexity 3786 (training loss), limit 1000. (step 101)",
        "OutOfMemoryError: tried to allocate 2 GiB",
        "AMD EPYC, 2 cores, Linux Python 3.11.7, usllm 0.1.0, torch 2.13.0+cpu",
        "usllm-report runs=sweep",
        "2026-01-02 03:04 UTC",
    ):
        assert part in page, part


def test_headings_of_the_table_are_buttons_that_tell_their_state(page: str) -> None:
    heads = re.findall(r'<th scope="col" class="(\w[\w ]*)" data-title="([^"]+)" aria-sort="none"><button', page)
    titles = [title for _, title in heads]
    bits = ["bpw asked", "bpw", "with entries", "model bpw"]
    assert titles[:9] == ["run", "status", *bits, "size", "rows", "allocation"]
    assert titles[-4:] == ["steps", "time", "folder", "overrides"]
    assert {kind for kind, title in heads if "bpw" in title or "finetuned" in title} == {"number"}


def test_names_from_outside_are_text(runs: list[Run], tmp_path: Path) -> None:
    hostile = [
        replace(
            run,
            name=f"{NASTY}{number}",
            model=NASTY,
            allocation=f"{NASTY}",
            overrides=(NASTY,),
            warnings=(NASTY,),
            command=NASTY,
            machine={"cpu": NASTY, "versions": {NASTY: NASTY}},
        )
        for number, run in enumerate(runs[:3])
    ]
    path = ReportWriter(tmp_path).write(hostile, title=NASTY, command=NASTY)
    page = path.read_text(encoding="utf-8")
    assert page.count("<script") == 1
    outline = Outline(page)
    assert outline.open == []
    assert not any(key.startswith("on") for _, attributes in outline.tags for key in attributes)
    assert not any("<" in found.name for found in tmp_path.iterdir())


def test_the_policy_allows_the_page_s_own_script_alone(page: str) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert "default-src &#39;none&#39;" in policy
    assert re.search(r"script-src &#39;sha256-[\w+/=]+&#39;$", policy)


def test_mixed_models_have_a_section_each(runs: list[Run], tmp_path: Path) -> None:
    other = [replace(run, model="meta-llama/Llama-3.2-1B", name=f"other-{run.name}") for run in runs[:1]]
    page = ReportWriter(tmp_path).write([*runs[:1], *other], title=None, command="x").read_text(encoding="utf-8")
    assert page.count('<section class="model"') == 2
    assert 'href="#model-1">meta-llama/Llama-3.2-1B</a>' in page
    assert (tmp_path / "meta-llama_Llama-3.2-1B_training_curves.png").exists()


def test_a_page_of_runs_that_measured_nothing_yet(runs: list[Run], tmp_path: Path) -> None:
    bare = [replace(run, status="running", perplexity={}, curves={}, layers=()) for run in runs[:2]]
    page = ReportWriter(tmp_path).write(bare, title=None, command="x").read_text(encoding="utf-8")
    assert "2 runs: 2 running." in page
    assert "<svg" not in page


def test_summary_names_the_best_finished_run(runs: list[Run]) -> None:
    assert summary(runs)[1].startswith("Lowest perplexity on wikitext2, window 512: ")
    assert "(1 bpw, 1 row, waterfill), dense model 30.20" in summary(runs)[1]


def test_a_machine_is_named_once(runs: list[Run]) -> None:
    assert len(machines(runs)) == 1
    assert machines([replace(run, machine={}) for run in runs]) == []


def test_a_front_is_explained_where_one_is_drawn(page: str, runs: list[Run], tmp_path: Path) -> None:
    assert page.count("(Pareto front)") == 1
    one = [run for run in runs if run.layers][:1]
    assert "Pareto" not in ReportWriter(tmp_path).write(one, title=None, command="x").read_text(encoding="utf-8")
