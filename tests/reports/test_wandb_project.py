"""Runs of a W&B project, from a stand-in for its API."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import wandb
from synthetic import config

from usllm.reports.runs import TestText
from usllm.reports.wandb_project import read_project
from usllm.reports.writing import ReportWriter
from usllm.system.errors import UserError


@dataclass
class ApiRun:
    """What ``wandb.Api().runs`` gives, as far as it is used."""

    name: str
    id: str
    state: str
    config: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    url: str = "https://wandb.ai/me/usllm/runs/x"

    def scan_history(self, keys: list[str]) -> Iterator[dict[str, Any]]:
        for row in self.history:
            if all(key in row for key in keys):
                yield {key: row[key] for key in keys}


@dataclass
class Api:
    found: list[ApiRun] | Exception
    asked: list[str] = field(default_factory=list)

    def runs(self, path: str) -> list[ApiRun]:
        self.asked.append(path)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


SUMMARY = {
    "perplexity/wiki/text/512/dense": 30.0,
    "perplexity/wiki/text/512/finetuned": 900.0,
    "perplexity/odd": 1.0,
    "sketch/bits_per_weight": 0.4996,
    "sketch/model_bits_per_weight": 4.9,
    "sketch/model_bytes": 82_000_000,
    "health/healthy": 0.0,
    "_runtime": 61.5,
}
HISTORY = [
    {"trainer/global_step": 0, "train/loss": 5.0},
    {"trainer/global_step": 1, "train/loss": 4.0, "val/loss": 4.5},
    {"trainer/global_step": 1, "lr": 0.1},
]


def test_numbers_curves_and_configuration_are_read() -> None:
    api = Api([ApiRun("a/b", "id1", "finished", config(0.5, 3, "waterfill"), SUMMARY, HISTORY)])
    (run,) = read_project("me/usllm", api)
    assert api.asked == ["me/usllm"]
    assert (run.name, run.status, run.place) == ("a_b (id1)", "finished", "https://wandb.ai/me/usllm/runs/x")
    assert (run.bits_asked, run.bits, run.model_bits, run.bytes) == (0.5, 0.4996, 4.9, 82_000_000)
    assert (run.rows, run.allocation, run.seconds) == (3, "waterfill", 61.5)
    text = TestText("wiki/text", 512, 0, 0)
    assert (run.perplexity[text].dense, run.perplexity[text].sketched, run.finetuned(text)) == (30.0, None, 900.0)
    assert run.curves["train/loss"].values == (5.0, 4.0)
    assert run.curves["val/loss"].steps == (2,)
    assert run.warnings == ("health checks failed; see the run's page",)


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("finished", "finished"),
        ("running", "running"),
        ("failed", "failed"),
        ("crashed", "interrupted"),
        ("preempted", "interrupted"),
    ],
)
def test_states_have_one_name_each(state: str, status: str) -> None:
    (run,) = read_project("usllm", Api([ApiRun("a", "i", state, config(0.5, 1, "waterfill"))]))
    assert run.status == status


def test_other_runs_of_the_project_are_left_out() -> None:
    api = Api([ApiRun("a", "1", "finished", {"lr": 1}), ApiRun("b", "2", "running", config(0.5, 1, "uniform"))])
    assert [run.name for run in read_project("me/usllm", api)] == ["b (2)"]


def test_runs_of_one_name_stay_apart_and_make_a_page(tmp_path: Path) -> None:
    runs = [ApiRun("same", str(n), "finished", config(0.5, n, "waterfill"), SUMMARY, HISTORY) for n in (1, 2)]
    page = ReportWriter(tmp_path).write(read_project("me/usllm", Api(runs)), title=None, command="x")
    assert "2 runs: 2 finished." in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ([], "holds no run of usllm-train"),
        (ValueError("Could not find project usllm"), "Could not find project"),
        (wandb.errors.CommError("no network"), "no network"),
        (ConnectionError(), "ConnectionError"),
    ],
)
def test_what_cannot_be_read_is_a_clear_error(found: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        read_project("me/usllm", Api(found))


@pytest.mark.parametrize("address", ["", "a/b/c"])
def test_an_address_has_at_most_two_parts(address: str) -> None:
    with pytest.raises(UserError, match="wandb:<entity>/<project>"):
        read_project(address, Api([]))


def test_a_run_without_bits_is_dense_only_where_it_calibrates_nothing() -> None:
    dense = {**config(0.5, 1, "waterfill"), "callbacks": {"importance_calibration": None}}
    runs = [ApiRun("a", "1", "finished", config(0.5, 1, "waterfill")), ApiRun("b", "2", "finished", dense)]
    assert [run.dense for run in read_project("me/usllm", Api(runs))] == [False, True]
