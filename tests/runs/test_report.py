"""The closing screen shows what a user needs, also when something was not measured."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from usllm.runs.report import human_bytes, print_outcome, print_report


def report(**changes: Any) -> dict[str, Any]:
    row = {"test_set": "validation", "window": 512, "windows": 4, "tokens": 9000}
    return {
        "name": "demo",
        "perplexity": [{**row, "dense": 12.5, "sketched": 1e9, "finetuned": 40.25}],
        "bits_per_weight": {"asked": 0.5, "achieved": 0.4987, "with_entries": 0.5001, "model": 5.25},
        "bytes": {"sketched": 88_000_000, "dense_bf16": 269_000_000},
        "steps": 100,
        "tokens": 51_200,
        "seconds": {"training": 61.0, "total": 92.5},
        "precision": "32-true",
        "tokenizer": {"name": "bytes", "bos": "none added"},
        "checkpoint": "runs/" + "long/" * 40 + "step=1.ckpt",
        "report": "runs/demo/default/report.json",
        "health": {"warnings": [{"check": "perplexity", "step": 9, "message": "perplexity 2000"}]},
        "next": ["usllm-eval ckpt=runs/demo/default"],
        "machine": {"cpu": "Some CPU", "cores": 2, "python": "3.11.7", "versions": {"torch": "2.13.0"}},
        **changes,
    }


def shown(content: dict[str, Any]) -> str:
    screen = io.StringIO()
    print_report(content, Console(file=screen, width=80))
    return screen.getvalue()


def test_time_of_a_run_that_was_continued_is_not_called_all_of_it() -> None:
    seconds = {"training": 61.0, "total": 92.5}
    assert "1 min 32 s in all" in shown(report(seconds={**seconds, "continued": False}))
    told = " ".join(shown(report(seconds={**seconds, "continued": True})).split())
    assert "1 min 32 s in the last of its calls" in told and "in all" not in told


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ({"processes": 1, "kind": "cuda", "strategy": "SingleDeviceStrategy"}, "torch 2.13.0; computed on cuda"),
        ({"processes": 2, "kind": "cpu", "strategy": "DDPStrategy"}, "computed on cpu by 2 processes (DDPStrategy)"),
    ],
    ids=["one", "two"],
)
def test_closing_table_says_on_what_a_run_computed(devices: dict[str, Any], words: str) -> None:
    told = " ".join(shown(report(devices=devices)).split())
    assert words in told and ("processes" in told) == (devices["processes"] > 1)


def test_closing_table_names_everything() -> None:
    text = shown(report())
    for part in (
        "12.50",
        "1.00e+09",
        "40.25",
        "2,048 of 9,000",
        "512, none",
        "0.4987 of 0.5 asked",
        "0.5001 with the JSON entries of tensors",
        "5.2500 over all parameters",
        "88.0 MB sketched, 269.0 MB dense",
        "100 steps, 51,200 tokens",
        "1 min 01 s training",
        "none added",
        "Some CPU, 2 cores",
        "perplexity 2000",
        "usllm-eval ckpt=runs/demo/default",
    ):
        assert part in text


def test_a_token_at_the_start_of_each_window_is_said_and_is_no_token_of_the_text() -> None:
    row = {"test_set": "a", "window": 9, "windows": 10, "tokens": 500, "window_start": "each", "after": 3.0}
    text = shown(report(perplexity=[row]))
    assert "9, each" in text
    assert "80 of 500" in text


def test_table_of_all_stages_fits_into_a_narrow_screen() -> None:
    (row,) = report()["perplexity"]
    text = shown(report(perplexity=[{**row, "reconstructed": 200.0}]))
    heading = next(line for line in text.splitlines() if "dense" in line)
    assert [word for word in ("test set", "window, start", "reconstructed", "finetuned") if word not in heading] == []
    assert "measured on" in text
    assert "validation/512: 2,048 of 9,000 tokens" in text


def test_long_paths_stay_on_one_line() -> None:
    content = report()
    assert content["checkpoint"] in shown(content)


def test_a_stage_that_was_not_measured_says_so() -> None:
    rows = [{"test_set": "a", "window": 8, "windows": 1, "tokens": 8, "dense": 2.0, "finetuned": 3.0}]
    rows.append({"test_set": "b", "window": 8, "windows": 1, "tokens": 8, "finetuned": 3.0})
    assert "not measured" in shown(report(perplexity=rows))


def test_a_model_finetuned_dense_has_no_bits() -> None:
    assert "finetuned dense" in shown(report(bits_per_weight=None, bytes=None, health={}))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2_500_000, "2.5 MB"), (4e9, "4.00 GB")]
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(("changes", "rate"), [({}, "0.4987 bits per weight"), ({"bits_per_weight": None}, "dense")])
def test_run_among_many_that_has_ended_before_gets_one_line(changes: dict[str, Any], rate: str) -> None:
    screen = io.StringIO()
    print_outcome(report(**changes), Console(file=screen, width=80))
    assert screen.getvalue() == (
        f"Finished before: runs/demo/default/report.json, {rate}, "
        "perplexity validation/512 40.25 (window start: none)\n"
    )
