"""Labels tell the runs of a group apart, and say no more than that takes."""

from __future__ import annotations

from dataclasses import replace

from synthetic import config

from usllm.reports.labels import by_model, labels, text_names, texts_of
from usllm.reports.runs import Run, TestText, record


def run(name: str, rate: float = 0.5, rows: int = 1, allocation: str = "waterfill", **changes: object) -> Run:
    settings = config(rate, rows, allocation)
    for key, value in changes.items():
        group, _, leaf = key.partition("__")
        settings[group] = {**settings[group], leaf: value} if leaf else value
    return record(name, f"/runs/{name}", "finished", {}, settings)


def test_rate_rows_and_allocation_make_a_label() -> None:
    found = labels([run("a"), run("b", rows=3), run("c", rate=1.0, allocation="proportional")])
    assert found == {
        "a": "0.5 bpw, 1 row, waterfill",
        "b": "0.5 bpw, 3 rows, waterfill",
        "c": "1 bpw, 1 row, proportional",
    }


def test_what_else_differs_is_added_where_it_is_needed() -> None:
    found = labels([run("a", optimizer__lr=1e-4), run("b", optimizer__lr=1e-3), run("c", rows=2)])
    assert found["a"] == "0.5 bpw, 1 row, waterfill, lr=0.0001"
    assert found["b"] == "0.5 bpw, 1 row, waterfill, lr=0.001"
    assert found["c"] == "0.5 bpw, 2 rows, waterfill"


def test_seeds_tell_apart() -> None:
    assert labels([run("a", seed=1), run("b", seed=2)])["b"].endswith("seed=2")


def test_names_serve_where_too_much_or_nothing_differs() -> None:
    assert labels([run("x"), run("y")])["y"] == "0.5 bpw, 1 row, waterfill, y"
    many = [run(name, optimizer__lr=n, trainer__max_steps=n, seed=n) for n, name in enumerate("pq")]
    assert labels(many)["p"].endswith(", p")


def test_labels_are_unique(runs: list[Run]) -> None:
    assert len(set(labels(runs).values())) == len(runs)


def test_runs_are_grouped_by_dense_model() -> None:
    groups = by_model([run("a"), replace(run("b"), model="Llama"), run("c", rate=0.25)])
    assert {model: [r.name for r in group] for model, group in groups.items()} == {
        "SmolLM2-135M": ["c", "a"],
        "Llama": ["b"],
    }


def test_test_texts_are_named_as_far_as_they_differ() -> None:
    alone, other = TestText("wiki", 512, 8, 1000), TestText("imdb", 512, 8, 1000)
    assert text_names([alone, other], short=True) == {alone: "wiki", other: "imdb"}
    assert text_names([alone])[alone] == "wiki, window 512"
    longer = TestText("wiki", 2048, 8, 1000)
    assert text_names([alone, longer], short=True)[alone] == "wiki, window 512"
    fewer = TestText("wiki", 512, 4, 1000)
    assert text_names([alone, fewer])[fewer] == "wiki, window 512, 4 windows"
    changed = TestText("wiki", 512, 8, 999)
    assert text_names([alone, changed])[changed] == "wiki, window 512, 8 windows of 999 tokens"
    each = TestText("wiki", 512, 8, 1000, "each")
    assert text_names([alone, each], short=True) == {alone: "wiki", each: "wiki, window start each"}
    assert text_names([alone, each])[each] == "wiki, window 512, window start each"


def test_texts_keep_their_order(runs: list[Run]) -> None:
    assert [text.name for text in texts_of(runs)] == ["wikitext2", "imdb"]
