"""Occupancy and load by hash."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from usllm.experiments.collision_rate import load_spread
from usllm.sketch import SketchConfig, build_plan


@pytest.fixture(scope="module")
def finished(run_study: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("collisions")
    return folder, run_study("collision_rate", folder, "study.sequences=4")


def test_balanced_leaves_no_state_unoccupied_and_uniform_does(finished: tuple[Path, dict[str, Any]]) -> None:
    hashes = finished[1]["hashes"]
    assert hashes["balanced"]["unoccupied"] == 0
    assert hashes["uniform"]["unoccupied"] > 0
    assert all(layer["load_spread"] <= 1 for layer in hashes["balanced"]["layers"])
    assert any(layer["load_spread"] > 1 for layer in hashes["uniform"]["layers"])


def test_histogram_counts_the_states_of_all_layers(finished: tuple[Path, dict[str, Any]]) -> None:
    for found in finished[1]["hashes"].values():
        states = sum(layer["states"] for layer in found["layers"])
        assert sum(found["load_histogram"].values()) == states
        empty = found["load_histogram"].get("0", 0)
        assert empty / states == pytest.approx(found["unoccupied"])


def test_every_layer_and_hash_is_in_the_csv_file_and_there_is_a_picture(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    with (folder / "collision_rate.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 12
    assert {row["hash"] for row in rows} == {"balanced", "uniform"}
    assert all(layer["bits_per_weight"] <= 0.5 for found in result["hashes"].values() for layer in found["layers"])
    assert (folder / "collision_rate.png").read_bytes().startswith(b"\x89PNG")


def test_finished_study_prints_its_table_again_and_is_not_overwritten(
    finished: tuple[Path, dict[str, Any]], run_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = finished
    before = (folder / "collision_rate.csv").stat().st_mtime_ns
    assert run_study("collision_rate", folder, "study.sequences=4", "resume=true") == result
    assert "Collisions by kind of layer" in capsys.readouterr().out
    assert (folder / "collision_rate.csv").stat().st_mtime_ns == before
    for more, named in (("study.sequences=4", "resume=true"), ("study.sequences=5", "resume=true")):
        with pytest.raises(SystemExit):
            run_study("collision_rate", folder, more)
        assert named in capsys.readouterr().err


def test_other_settings_than_the_kept_result_had_are_named(
    finished: tuple[Path, dict[str, Any]], run_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_study("collision_rate", finished[0], "study.sequences=5", "resume=true")
    assert "study.sequences: 4 there, 5 here" in capsys.readouterr().err


def test_load_spread_is_within_groups_not_between_channels() -> None:
    importance = torch.ones(16)
    importance[:4] = 20.0  # these channels have more states, so their loads are lower
    plan = build_plan((64, 16), importance, SketchConfig(bits_per_weight=2.0, rows=1, group_size=64), "layer")
    low, _, high = plan.load()
    assert high - low > 1
    assert load_spread(plan) <= 1
