"""Untrained output error by layer and allocation."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from usllm.compress import swap_linears_
from usllm.experiments.layer_error import COLUMNS, column, shared_inputs, short_name, waterfill_lowest
from usllm.models.random_model import random_model
from usllm.system.errors import UserError

NAMES = [column(allocation, rows, scaled) for allocation, rows in COLUMNS for scaled in (False, True)]


@pytest.fixture(scope="module")
def finished(run_study: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("errors")
    return folder, run_study("layer_error", folder, "study.sequences=4", "study.rates=[2.0]")


def test_every_layer_has_every_column(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    assert len(result["rows"]) == 12
    for row in result["rows"]:
        assert {"layer", "rate", "bound", *NAMES} == set(row)
        assert all(0 < row[name] < 1.5 for name in NAMES)
    with (folder / "layer_error.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    assert (folder / "layer_error.png").read_bytes().startswith(b"\x89PNG")


def test_no_sketch_is_below_the_rate_distortion_bound(finished: tuple[Path, dict[str, Any]]) -> None:
    for row in finished[1]["rows"]:
        assert row["bound"] < min(row[name] for name in NAMES)


def test_summary_counts_the_layers_of_the_table(
    finished: tuple[Path, dict[str, Any]], run_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = finished
    run_study("layer_error", folder, "study.sequences=4", "study.rates=[2.0]", "resume=true")
    shown = capsys.readouterr().out
    counts = result["waterfill_lowest"]["2"]["R=3, output scale"]
    assert f"waterfill is lowest in {counts['lowest']} of 12 layers (R=3, output scale)" in shown
    assert "0.q" in shown


def test_waterfill_is_held_against_the_others_of_its_combination() -> None:
    row = dict.fromkeys(NAMES, 0.5) | {"layer": "a"}
    row |= {"waterfill_r1": 0.4, "waterfill_r3": 0.6, "uniform_r3_scaled": 0.1}
    found = waterfill_lowest([row])
    assert found["R=1"]["lowest"] == 1
    assert found["R=3"]["higher"] == ["a"]
    assert found["any rows"]["lowest"] == 1
    assert found["any rows, output scale"]["higher"] == ["a"]
    assert found["R=1, output scale"]["lowest"] == 1  # equal is as low


def test_layers_that_read_one_tensor_share_its_moment() -> None:
    model = random_model("llama")
    layers = swap_linears_(model)
    first = shared_inputs(model, layers, {"input_ids": torch.arange(8)[None]})
    assert list(first) == list(layers)
    block = "model.layers.1."
    assert {first[f"{block}self_attn.{n}_proj"] for n in "qkv"} == {f"{block}self_attn.q_proj"}
    assert first[f"{block}mlp.up_proj"] == f"{block}mlp.gate_proj"
    assert first[f"{block}mlp.down_proj"] == f"{block}mlp.down_proj"
    assert len(set(first.values())) == 6


def test_layer_that_is_never_reached_is_named() -> None:
    model = random_model("llama")
    layers = {**swap_linears_(model), "elsewhere": nn.Linear(2, 2)}
    with pytest.raises(UserError, match="elsewhere"):
        shared_inputs(model, layers, {"input_ids": torch.arange(8)[None]})


def test_short_names_are_those_of_the_tables() -> None:
    assert short_name("model.layers.15.mlp.down_proj") == "15.down"
    assert short_name("lm_head") == "lm_head"


@pytest.mark.parametrize(
    ("override", "named"),
    [("+study.rate=1", "study.rate=1"), ("study.rates=[0]", "study.rates"), ("study.sequences=0", "study.sequences=0")],
)
def test_bad_settings_are_named(
    override: str, named: str, run_study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_study("layer_error", tmp_path, override)
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error
