"""Curves from the logger's files, whole and in the middle of being written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import write_curves

from usllm.reports.curves import Curve, read_curves


def test_steps_count_from_one_and_blank_cells_are_no_points(tmp_path: Path) -> None:
    write_curves(tmp_path, [4.0, 3.0, 2.0])
    curves = read_curves(tmp_path)
    assert curves["train/loss"] == Curve((1, 2, 3), (4.0, 3.0, 2.0))
    assert "val/loss" not in curves
    assert "step" not in curves


def test_what_a_resumed_run_repeats_counts_once(tmp_path: Path) -> None:
    write_curves(tmp_path, [9.0, 8.0, 7.0, 6.0])
    write_curves(tmp_path, [5.0, 4.0], first=2, version=1)
    assert read_curves(tmp_path)["train/loss"] == Curve((1, 2, 3, 4), (9.0, 8.0, 5.0, 4.0))


def test_parts_follow_each_other_by_number(tmp_path: Path) -> None:
    write_curves(tmp_path, [1.0], version=2)
    write_curves(tmp_path, [2.0], version=10)
    assert read_curves(tmp_path)["train/loss"].values == (2.0,)


def test_a_row_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    write_curves(tmp_path, [4.0, 3.0])
    path = tmp_path / "csv" / "version_0" / "metrics.csv"
    path.write_text(path.read_text(encoding="utf-8") + "0,,2,1", encoding="utf-8")
    assert read_curves(tmp_path)["train/loss"].steps == (1, 2)


@pytest.mark.parametrize(
    "content", ["", "step", "epoch,step,train/loss\n", "\0\0\0\n\0", "step,train/loss\nx,1\n1,y\n"]
)
def test_a_file_without_values_gives_no_curve(tmp_path: Path, content: str) -> None:
    path = tmp_path / "csv" / "version_0" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    assert "train/loss" not in read_curves(tmp_path)


def test_no_files_no_curves(tmp_path: Path) -> None:
    assert read_curves(tmp_path) == {}


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(1, 40))
def test_smoothing_is_the_mean_of_the_last_values(values: list[float], steps: int) -> None:
    curve = Curve(tuple(range(1, len(values) + 1)), tuple(values))
    smooth = curve.smoothed(steps)
    for index, value in enumerate(smooth.values):
        last = values[max(0, index + 1 - steps) : index + 1]
        assert value == pytest.approx(sum(last) / len(last), abs=1e-9)


def test_finite_drops_what_cannot_be_drawn() -> None:
    assert Curve((1, 2, 3), (1.0, math.nan, math.inf)).finite() == Curve((1,), (1.0,))


@given(st.integers(1, 2000), st.integers(1, 50))
def test_thinned_curves_keep_their_end_and_their_limit(length: int, points: int) -> None:
    curve = Curve(tuple(range(1, length + 1)), tuple(float(n) for n in range(length)))
    thin = curve.thinned(points)
    assert len(thin.steps) == len(thin.values) <= points
    assert thin.steps[-1] == length
    assert set(thin.steps) <= set(curve.steps)
